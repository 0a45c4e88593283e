"""What the site needs beside the pages in docs/: pages from elsewhere."""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
ROOT_PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
}


def on_files(files: Files, config: MkDocsConfig) -> None:
    """The pages of the root become pages, the examples become files that pages may link to."""
    for name, path in ROOT_PAGES.items():
        page = (ROOT / name).read_text().replace("](docs/", "](")
        for other, its_path in ROOT_PAGES.items():
            page = page.replace(f"]({other}", f"]({its_path}")
        files.append(File.generated(config, path, content=page))
    for example in sorted((ROOT / "examples").glob("*.py")):
        path = f"examples/{example.name}"
        files.append(File.generated(config, path, abs_src_path=str(example)))


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links that lead out of docs/ lead to those."""
    return markdown.replace("](../README.md", "](index.md").replace("](../examples/", "](examples/")

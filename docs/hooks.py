"""Pages that mkdocs.yml does not name stand at the end of the menu. Plots live beside their result files, outside the pages'
folder: they are added to the site as figures of it."""

from pathlib import Path

from mkdocs.structure.files import File


DOCS = Path(__file__).resolve().parent
RESULTS = DOCS.parent / "benchmarks" / "results"


def on_config(config):
    named = {path for entry in config.nav for path in entry.values()}
    config.nav += [page.name for page in sorted(DOCS.glob("*.md")) if page.name not in named]
    return config


def on_files(files, config):
    for plot in sorted(RESULTS.glob("*.png")):
        files.append(File.generated(config, f"figures/{plot.name}", abs_src_path=str(plot)))
    return files


def on_page_markdown(markdown, page, config, files):
    return markdown.replace("](../benchmarks/results/", "](figures/")

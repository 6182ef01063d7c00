"""Plots live beside their result files, outside the pages' folder: they are added to the site as figures of it."""

from pathlib import Path

from mkdocs.structure.files import File


RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"


def on_files(files, config):
    for plot in sorted(RESULTS.glob("*.png")):
        files.append(File.generated(config, f"figures/{plot.name}", abs_src_path=str(plot)))
    return files


def on_page_markdown(markdown, page, config, files):
    return markdown.replace("](../benchmarks/results/", "](figures/")

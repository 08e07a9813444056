"""Hook of mkdocs.yml: the site's files are those of the repository, in their places, so README.md is the front page."""

from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
# Pages, and the files that they link to; mkdocs build --strict reports a link to any other file.
FILES = ("*.md", "docs/*.md", "datasets/README.md", "benchmarks/*.md", "benchmarks/*.json", "benchmarks/*.png",
         "experiments/*.png", "experiments/plans/*.md",
         "examples/*", "CITATION.cff")  # fmt: skip


def on_files(files, config):
    for file in [file for file in files if file.src_dir == config.docs_dir]:
        files.remove(file)
    for path in sorted(path for pattern in FILES for path in ROOT.glob(pattern) if path.is_file()):
        name = path.relative_to(ROOT).as_posix()
        files.append(File(name, str(ROOT), config.site_dir, config.use_directory_urls))
    return files

"""Pages of the site that are made from other files, and links between pages and files of the repository.

mkdocs calls the ``on_`` functions. ``generated_pages`` needs no mkdocs, so that the tests can follow links to these pages.
"""

from __future__ import annotations

import json
import posixpath
import re
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"

# [text](path) and ![text](path), of files alone: nothing with a scheme.
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([\w./-]+\.\w+|[\w./-]+/)(#[^()\s]*)?\)")
FENCED = re.compile(r"(^[ ]*```.*?^[ ]*```[ ]*$)", re.MULTILINE | re.DOTALL)
# :func:`name` of docstrings.
ROLE = re.compile(r":(?:class|func|meth|data|mod|attr|exc):<code>([^<]*)</code>")
NOTEST = re.compile(r"^([ ]*```\w+) notest.*$", re.MULTILINE)
NO_RESULTS = """No result file is in `benchmarks/results/`. To make one:

```
make bench        # on the CPU; the files are in runs/bench
make gpu-bench    # on a machine with a GPU; the files are in benchmarks/results
```

`python -m metafast bench --out benchmarks/results` writes the files of a CPU there too.
"""


class Page(NamedTuple):
    """A generated page: its place in the site, the file that it is made from, its text, its title in the navigation."""

    uri: str
    source: str
    text: str
    title: str
    section: str


def generated_pages() -> list[Page]:
    """Every generated page."""
    pages = []
    for path in sorted((ROOT / "metafast" / "ops").rglob("README.md")):
        text = path.read_text()
        title = text.partition("\n")[0].lstrip("# ")
        uri = f"maths/ops/{'-'.join(path.parent.relative_to(ROOT / 'metafast' / 'ops').parts) or 'index'}.md"
        pages.append(_page(uri, path, text, title, "Mathematics"))
    for folder in ("engine", "program"):
        path = ROOT / "metafast" / folder / "README.md"
        pages.append(
            _page(f"extending/{folder}.md", path, path.read_text(), path.read_text().split("\n")[0][2:], "Extending")
        )
    examples = ROOT / "examples" / "README.md"
    pages.append(_page("howto/examples.md", examples, examples.read_text(), "Examples", "How to"))
    contributing = ROOT / "CONTRIBUTING.md"
    pages.append(
        _page("extending/contributing.md", contributing, contributing.read_text(), "Contributing", "Extending")
    )
    suites = ROOT / "benchmarks" / "README.md"
    pages.append(_page("benchmark-suites.md", suites, suites.read_text(), "Benchmark suites", ""))
    pages.append(Page("benchmark-results.md", "benchmarks/results", results_page(), "Benchmark results", ""))
    changelog = ROOT / "CHANGELOG.md"
    pages.append(_page("changelog.md", changelog, changelog.read_text(), "Changelog", ""))
    return pages


def _page(uri: str, path: Path, text: str, title: str, section: str) -> Page:
    return Page(uri, path.relative_to(ROOT).as_posix(), text, title, section)


def results_page() -> str:
    """A table of every result file of ``benchmarks/results``, or how to make one."""
    lines = ["# Benchmark results", ""]
    files = sorted(RESULTS.glob("*.json")) if RESULTS.is_dir() else []
    for path in files:
        lines += [*_results(path), ""]
    return "\n".join(lines) if files else "\n".join([*lines, NO_RESULTS])


def _results(path: Path) -> list[str]:
    results = json.loads(path.read_text())
    info = results.get("machine_info", {})
    machine = ", ".join(str(info[key]) for key in ("device", "torch", "python_version") if key in info)
    lines = [f"## {path.stem}", "", f"{machine or 'machine not named'}; {results.get('datetime', 'no date')}.", ""]
    lines += ["| case | what | cost | against | cost | ratio |", "| --- | --- | --- | --- | --- | --- |"]
    for entry in sorted((e for e in results["benchmarks"] if not e.get("error")), key=lambda e: str(e["group"])):
        extra = entry["extra_info"]
        case = f"| {entry['group']} | {extra.get('what', entry['name'])} "
        compared = extra.get("comparisons", [])
        if not compared:
            lines.append(f"{case}| {_cost('time', entry['stats']['median'])} | | | |")
        for found in compared:
            own, other = _cost(found["of"], found["own"]), _cost(found["of"], found["other"])
            lines.append(f"{case}| {own} | {found['with']} | {other} | {found['ratio']:.2f} |")
    return lines


def _cost(of: str, value: float) -> str:
    scale, unit = {"time": (1e3, "ms"), "memory": (2**-20, "MiB")}.get(of, (1, of))
    return f"{scale * value:.2f} {unit}"


def on_config(config: Any) -> Any:
    """Puts the generated pages into the navigation."""
    for page in generated_pages():
        entries = config.nav
        if page.section:
            entries = next(entry[page.section] for entry in config.nav if page.section in entry)
        entries.append({page.title: page.uri})
    return config


def on_files(files: Any, config: Any) -> Any:
    """Adds the generated pages."""
    from mkdocs.structure.files import File

    for page in generated_pages():
        files.append(File.generated(config, page.uri, content=page.text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Links to files of the repository lead to the pages made from them; other files of it are named without a link."""
    return for_the_site(markdown, page.file.src_uri)


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """Roles of docstrings become links, where the reference has the name."""
    return ROLE.sub(r'<autoref optional identifier="\1"><code>\1</code></autoref>', html)


def for_the_site(markdown: str, uri: str) -> str:
    """The text of a page as mkdocs takes it: its links, and fences without the attributes that are for the tests."""
    generated = {page.source: page.uri for page in generated_pages()}
    sources = {page.uri: page.source for page in generated_pages()}
    here = posixpath.dirname(sources.get(uri, f"docs/{uri}"))

    def link(match: re.Match[str]) -> str:
        image, text, target, anchor = match[1], match[2], match[3], match[4] or ""
        path = posixpath.normpath(posixpath.join(here, target))
        if path in generated:
            found = generated[path]
        elif path.startswith("docs/"):
            found = path.removeprefix("docs/")
        elif image:
            return match[0]
        else:
            return text if text.strip("`") == path else f"{text} (`{path}`)"
        return f"{image}[{text}]({posixpath.relpath(found, posixpath.dirname(uri) or '.')}{anchor})"

    parts = FENCED.split(markdown)
    return "".join(
        NOTEST.sub(r"\1", part) if part.lstrip().startswith("```") else LINK.sub(link, part) for part in parts
    )

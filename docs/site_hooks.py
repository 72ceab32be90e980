"""What mkdocs does to the pages beside rendering them: some are filled in, and links out of docs/ lead to words.

`validation.md` takes the table of experiments/README.md and `reference.md` the public names of diffspec, each in place
of a comment, so that neither is written a second time. A link to a file outside docs/ works in a checkout and has no
page on the site: there its path is shown instead. Examples in docstrings become code, units in brackets stay text. A
notebook becomes a page as it was committed, cells and outputs; nothing is run (docs/notebooks/execute.py does that).
"""

import json
import re
from base64 import b64encode
from pathlib import Path
from posixpath import dirname, join, normpath

REPOSITORY = Path(__file__).resolve().parents[1]
LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)\s]+)\)")
ROLE = re.compile(r":(?:mod|class|func|meth|data|attr):(?=<code|`)")
TABLE, NAMES = "<!-- table of experiments/README.md -->", "<!-- public names -->"


def experiments_table() -> str:
    """The table of experiments/README.md, with links as seen from docs/."""
    text = (REPOSITORY / "experiments" / "README.md").read_text(encoding="utf-8")
    rows = "\n".join(line for line in text.splitlines() if line.startswith("|"))
    return LINK.sub(lambda found: f"[{found[1]}](../experiments/{found[2]})", rows)


def theory_objects() -> list[str]:
    """Dotted names that theory.md links to in the reference, in order, each once."""
    text = (REPOSITORY / "docs" / "theory.md").read_text(encoding="utf-8")
    return list(dict.fromkeys(re.findall(r"\(reference\.md#([\w.]+)\)", text)))


def public_objects() -> list[str]:
    """Dotted names of the objects behind `diffspec.__all__`, where they are defined."""
    import diffspec

    return [f"diffspec.{diffspec._HOME_OF[name]}.{name}" for name in diffspec.__all__]


def reference_entries() -> str:
    """Directives of mkdocstrings for every public name, and for what the theory links to besides."""
    public = public_objects()
    inside = [name for name in theory_objects() if not any(name == p or name.startswith(f"{p}.") for p in public)]
    entries = [f"::: {name}" for name in public]
    return "\n\n".join([*entries, "## Behind the equations", *(f"::: {name}" for name in inside)])


def filled(text: str) -> str:
    """A page with its comments replaced by what they stand for."""
    if TABLE in text:
        text = text.replace(TABLE, experiments_table())
    return text.replace(NAMES, reference_entries()) if NAMES in text else text


def inside_the_site(text: str, page: str) -> str:
    """A page in which links out of docs/ are the words and the path; `page` is its path below docs/."""

    def shown(found):
        target = normpath(join("docs", dirname(page), found[2].split("#")[0]))
        if ":" in found[2] or found[2].startswith("#") or target.startswith("docs/"):
            return found[0]
        return f"`{target}`" if target.endswith(found[1]) else f"{found[1]} (`{target}`)"

    return LINK.sub(shown, text)


def notebooks() -> dict[str, Path]:
    """Each notebook by the page that it becomes, such as ``notebooks/why-is-it-slow.md``."""
    found = sorted((REPOSITORY / "docs" / "notebooks").glob("*.ipynb"))
    return {f"notebooks/{path.stem}.md": path for path in found}


def notebook_page(notebook: dict) -> str:
    """A notebook as Markdown: prose as it is, code fenced, outputs as text, tables and drawings."""
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(re.sub(r"(\]\([^)]*)\.ipynb\)", r"\1.md)", source))
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            shown = {kind: "".join(text) for kind, text in output.get("data", {}).items()}
            if "image/svg+xml" in shown:  # its own document, so that ids of two do not clash
                encoded = b64encode(shown["image/svg+xml"].encode()).decode()
                parts.append(f'<img alt="the drawing of this cell" src="data:image/svg+xml;base64,{encoded}">')
            elif "text/html" in shown:
                parts.append(f"<div>{shown['text/html']}</div>")
            else:
                text = "".join(output.get("text", shown.get("text/plain", "")))
                parts.append(f"```text\n{text.rstrip()}\n```")
    return "\n\n".join(parts) + "\n"


def as_markdown(lines: list[str]) -> list[str]:
    """Lines of a docstring with each doctest as a fenced block; `[a] [b]` of prose is no reference."""
    found, fenced, example = [], False, False
    for line in lines:
        if line.startswith("```"):
            fenced = not fenced
        if not fenced and not example and line.startswith(">>> "):
            example = True
            found.append("```python")
        elif example and not line.strip():
            example = False
            found.append("```")
        code = fenced or example or line.startswith("    ")
        found.append(line if code else re.sub(r"\](\s?)\[(?=[^\]]*(?:\]$|\][^(\[]))", r"]\1\\[", line))
    return [*found, "```"] if example else found


def on_config(config, **_):
    from markdown.extensions import Extension
    from markdown.preprocessors import Preprocessor

    class Docstrings(Extension):
        def extendMarkdown(self, md):
            step = Preprocessor(md)
            step.run = as_markdown
            md.preprocessors.register(step, "docstrings", 40)  # before fences are taken out

    config.markdown_extensions.append(Docstrings())
    return config


def on_files(files, config, **_):
    from mkdocs.structure.files import File

    for page, path in notebooks().items():
        text = notebook_page(json.loads(path.read_text(encoding="utf-8")))
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown, page, **_):
    return inside_the_site(filled(markdown), page.file.src_uri)


def on_page_content(html, **_):
    return ROLE.sub("", html)

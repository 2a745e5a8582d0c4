"""The documentation is held to the code: links, commands, messages, and the generated page."""

import ast
import functools
import re
import runpy
import shlex
from pathlib import Path

import pytest
import tyro

import mlra_jax
from mlra_jax.cli import convert, describe, export, plot, prepare, serve
from mlra_jax.cli.configs import parse_train_args
from mlra_jax.cli.decode import DecodeArgs
from mlra_jax.cli.evaluate import EvaluateArgs
from mlra_jax.cli.plan import PlanArgs
from mlra_jax.cli.train import take_check
from mlra_jax.distributed import take_args

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
PARSERS = {
    "decode": DecodeArgs,
    "evaluate": EvaluateArgs,
    "prepare": prepare.PrepareArgs,
    "plot": plot.PlotArgs,
    "from-official": convert.FromOfficialArgs,
    "to-official": convert.ToOfficialArgs,
    "from-export": convert.FromExportArgs,
    "split-latents": convert.SplitLatentsArgs,
    "export": export.ExportArgs,
    "serve": serve.ServeArgs,
}
PLACEHOLDERS = {
    "CONFIG": "tiny",
    "HOST:PORT": "localhost:1",
    "N": "3",
    "I": "0",
    "$OMPI_COMM_WORLD_SIZE": "3",
}


def without_code(text):
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))


@functools.cache
def anchors(page):
    """The names that GitHub gives to the headings of a page."""
    fenced = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.+)$", fenced, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_relative_link_leads_somewhere(page):
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text())):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if "://" not in link and not (target.exists() and (not anchor or anchor in anchors(target))):
            broken.append(link)
    assert not broken


def test_the_index_names_every_page():
    index = (ROOT / "docs" / "README.md").read_text()
    pages = {page.name for page in PAGES if page.parent == ROOT / "docs"} - {"README.md"}
    assert not [name for name in pages if f"({name})" not in index]


def test_the_configuration_page_is_what_the_script_writes():
    script = runpy.run_path(str(ROOT / "docs" / "make_configuration.py"))
    assert script["PAGE"].read_text() == script["page"](), "run docs/make_configuration.py"


def test_the_interface_page_is_what_the_script_writes_and_describes_every_name():
    script = runpy.run_path(str(ROOT / "docs" / "make_api.py"))
    assert script["PAGE"].read_text() == script["page"](), "run docs/make_api.py"
    described = [name for part in script["SECTIONS"].values() for names in part for name in names.split()]
    assert sorted(described) == mlra_jax.__all__


@pytest.mark.smoke
def test_the_examples_of_the_interface_page_run_and_use_every_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    examples = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "api.md").read_text(), re.DOTALL)
    namespace = {}
    for i, example in enumerate(examples):
        exec(compile(example, f"api.md, example {i}", "exec"), namespace)
    assert set(re.findall(r"\bmlra\.(\w+)", "".join(examples))) == set(mlra_jax.__all__)


def shown_commands():
    """(program, arguments) of each command of ours that a page shows in code."""
    program = (
        r"(?:python3? (train|decode|evaluate)\.py|"
        r"mlra-(train|decode|evaluate|plan|prepare|plot|describe|convert|export|serve))\b,? +(.+)"
    )
    commands = set()
    for page in PAGES:
        fenced = False
        for line in page.read_text().replace("\\\n", " ").splitlines():
            fenced ^= line.lstrip().startswith("```")
            for code in [line] if fenced or line.startswith("    ") else re.findall(r"`([^`]+)`", line):
                for script, command, rest in re.findall(program, code):
                    if "--" in rest and "[--" not in rest:  # neither a mention nor a synopsis
                        commands.add((script or command, rest))
    return sorted(commands)


def arguments(rest):
    """The words of a command line up to a pipe or the like, with values in place of placeholders and variables."""
    rest = re.split(r" (?:[|>&;]|#)", rest)[0]
    if rest.count('"') % 2:  # the quotation that the command stands in ends here
        rest = rest.rpartition('"')[0]
    words = shlex.split(re.sub(r" \.\.\.$| --help\b", "", rest))
    if "," in rest.split(" ")[0]:  # a list in YAML
        words = [word.strip("[],") for word in words]
    words = [PLACEHOLDERS.get(word) or re.sub(r"\$\w+", "1", word) for word in words]
    return ["tiny" if word.endswith("config.json") else word for word in words if word]


@pytest.mark.parametrize(("program", "rest"), shown_commands())
def test_every_command_that_is_shown_parses(program, rest, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = arguments(rest)
    if "--" in words:  # what follows are an engine's
        words = words[: words.index("--")]
    distributed, args = take_args(words)
    assert not distributed.faults()
    if program == "convert":
        program, args = args[0], args[1:]
    if program == "plan":
        options, args = tyro.cli(PlanArgs, args=args, return_unknown_args=True)
        assert options.topology
    if program == "describe":
        _, args = tyro.cli(describe.DescribeArgs, args=args, return_unknown_args=True, use_underscores=False)
    if program == "train":
        _, args = take_check(args)
    if program in PARSERS:
        tyro.cli(PARSERS[program], args=args)
    else:
        parse_train_args(args)


@functools.cache
def literals():
    """All texts in the package's code, with … for what is formatted into them."""
    found = set()
    for file in (ROOT / "mlra_jax").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.add(
                    "".join(
                        getattr(part, "value", "…") if isinstance(part, ast.Constant) else "…"
                        for part in node.values
                    )
                )
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)
    return found


def explained_messages():
    """The messages of docs/troubleshooting.md, but for those of other libraries."""
    rows = re.findall(
        r"^\| `([^`]+)` \| (.+) \|$", (ROOT / "docs" / "troubleshooting.md").read_text(), re.MULTILINE
    )
    return [message for message, remark in rows if not remark.startswith("From ")]


@pytest.mark.parametrize("message", explained_messages())
def test_every_message_that_is_explained_is_one(message):
    pattern = re.compile(".*".join(map(re.escape, message.split("…"))), re.DOTALL)
    assert any(pattern.search(text) for text in literals())

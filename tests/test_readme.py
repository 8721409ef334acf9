"""The READMEs and the pages beside them: in step, and without files or flags that are
not there."""

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from jaxllm.config import RunConfig

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def shown(page: Path) -> list[str]:
    """The indented lines of a page, without their comments."""
    lines = page.read_text(encoding="utf-8").splitlines()
    code = [line[4:] for line in lines if line.startswith("    ")]
    return [re.sub(r"\s+#.*", "", line).rstrip(" \\") for line in code]


def commands(page: Path) -> list[str]:
    """What a page tells to run, continued lines put together."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    found = re.findall(r"(?:python|torchrun.*?) ((?:scripts|torch_ref)/[^`\n#]*)", text)
    return [" ".join(command.split()) for command in found]


def is_files(line: str) -> bool:
    return bool(re.match(r"(jaxllm|torch_ref|parity_tests|tests|scripts)/", line))


def test_both_readmes_show_the_same():
    one, other = (
        [line.split()[0] if is_files(line) else line for line in shown(ROOT / name)]
        for name in ("README.md", "README.zh-CN.md")
    )
    assert one == other
    tables = [
        re.findall(r"^\| ([^ ]*) \|", (ROOT / name).read_text("utf-8"), re.MULTILINE)
        for name in ("README.md", "README.zh-CN.md")
    ]
    assert tables[0][1:6] == tables[1][1:6] == [
        "`demo`", "`k-215m`", "`k-259m`", "`reference`", "`reference-small`"
    ]  # fmt: skip
    links = [
        set(re.findall(r"\]\((docs/[^)]*)\)", (ROOT / name).read_text("utf-8")))
        for name in ("README.md", "README.zh-CN.md")
    ]
    assert links[0] == links[1]


def test_the_readme_knows_every_page_and_every_room():
    text = (ROOT / "README.md").read_text("utf-8")
    for page in (ROOT / "docs").glob("*.md"):
        assert f"(docs/{page.name})" in text, f"{page.name} is on no map"
    for line in filter(is_files, shown(ROOT / "README.md")):
        assert (ROOT / line.split()[0]).exists(), line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    prose = re.sub(r"(?m)^    .*", "", page.read_text(encoding="utf-8"))
    for link in re.findall(r"\]\(([^)#]+)", prose):
        if "://" not in link:
            assert (page.parent / link).exists(), f"{page.name} links to {link}"


def has_field(kind: Any, path: list[str]) -> bool:
    kinds = {field.name: field.type for field in fields(kind)}
    return path[0] in kinds and (not path[1:] or has_field(kinds[path[0]], path[1:]))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_name_flags_that_exist(page):
    for command in commands(page):
        script = ROOT / command.split()[0]
        assert script.is_file(), command
        source = script.read_text(encoding="utf-8")
        if script.name == "ddp_pretrain.py":
            source = (ROOT / "torch_ref" / "arguments.py").read_text(encoding="utf-8")
        for flag in re.findall(r"(?<!\S)--([a-z][\w.-]*)", command):
            path = flag.replace("-", "_").split(".")
            if script.name == "pretrain.py":
                there = has_field(RunConfig, path) or flag in source
            else:
                there = re.search(rf"\b({path[0]}|{flag})\b", source) is not None
            assert there, f"{page.name}: {command}: no flag --{flag}"

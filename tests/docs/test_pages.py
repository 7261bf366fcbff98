"""The pages of the documentation: links lead somewhere, pictures say what they show, blocks of Python run."""

import ast
import copy
import inspect
import re

import pytest
import torch
from pages import PAGES, ROOT, blocks, headings, links, name_of, table_rows
from torch import nn

import optim_ext

WITH_PYTHON = [page for page in PAGES if any(block.language == "python" for block in blocks(page))]
# What else a block of code may be.
LANGUAGES = {"python", "sh", "text", "diff"}


def of_pages(pages=PAGES):
    return pytest.mark.parametrize("page", pages, ids=map(name_of, pages))


@of_pages()
def test_links_lead_somewhere(page):
    for _, _, target in links(page):
        if "://" in target:
            continue
        path, _, name = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), f"{target} is not there"
        assert found.is_relative_to(ROOT), f"{target} is not in the project"
        assert not name or name in headings(found), f"{target}: there is no such section"


@of_pages()
def test_pictures_say_what_they_show(page):
    for is_picture, words, target in links(page):
        if is_picture:
            assert len(words.split()) >= 3, f"{target} is shown without words for who does not see it"
            assert target.endswith(".png") and (page.parent / target).is_file(), target


@of_pages()
def test_blocks_of_code_name_their_language(page):
    for block in blocks(page):
        assert block.language in LANGUAGES, f"line {block.first_line - 1}"
        assert block.not_run is None or block.language == "python", f"line {block.first_line - 1}"


def test_few_blocks_are_not_run():
    left_out = [block for page in PAGES for block in blocks(page) if block.not_run]
    assert len(left_out) <= 5, [(block.first_line, block.not_run) for block in left_out]


def readers_own():
    """What the reader of a page has already: a model, its optimizer, data, and functions of a training loop."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    batch = torch.randn(16, 4), torch.randint(2, (16,))

    def loss_of(model, batch):
        inputs, labels = batch
        return nn.functional.cross_entropy(model(inputs), labels)

    optimizer = optim_ext.AdamW(model.parameters(), lr=1e-3)
    matrices = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() != 2]
    return {
        "torch": torch,
        "optim_ext": optim_ext,
        "optim": optim_ext,
        "cross_entropy": nn.functional.cross_entropy,
        "model": model,
        "optimizer": optimizer,
        "muon": optim_ext.Muon(matrices),
        "adamw": optim_ext.AdamW(others),
        "batch": batch,
        "batches": [batch],
        "loss": loss_of(model, batch),
        "loss_of": loss_of,
        "evaluate": lambda model: loss_of(model, batch).item(),
    }


def run(source, path, names):
    """Runs the blocks of a page, one after the other, each on its own lines, so that errors name the page's."""
    path.write_text(source)
    exec(compile(source, str(path), "exec"), names)


def python_of(page):
    lines = [""] * len(page.read_text().splitlines())
    for block in blocks(page):
        if block.language == "python" and block.not_run is None:
            lines[block.first_line - 1 : block.first_line - 1 + len(block.lines)] = block.lines
    return "\n".join(lines) + "\n"


@of_pages(WITH_PYTHON)
def test_blocks_of_python_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(python_of(page), tmp_path / f"{page.stem}.py", readers_own() | {"__name__": page.stem})


@of_pages(WITH_PYTHON)
def test_blocks_that_are_not_run_are_python(page):
    for block in blocks(page):
        if block.language == "python":
            ast.parse("\n".join(block.lines))


def test_a_block_that_fails_names_the_line_of_its_page(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# Page\n\n```python\nx = 1\n```\n\n```python\nx / 0\n```\n")
    with pytest.raises(ZeroDivisionError) as error:
        run(python_of(page), tmp_path / "page.py", {})
    assert error.traceback[-1].lineno + 1 == 8


def test_the_reference_has_every_argument_that_constructors_add():
    named = {name for row in table_rows(ROOT / "docs/api/optimizers.md") for name in re.findall(r"`(\w+)`", row[0])}
    taken = inspect.signature(optim_ext.AdamW).parameters.keys()
    assert named == taken - inspect.signature(torch.optim.AdamW).parameters.keys()


def test_the_reference_has_every_name_of_the_package():
    text = "\n".join(page.read_text() for page in (ROOT / "docs/api").glob("*.md"))
    shown = set(re.findall(r"^::: (\S+)$", text, re.M))
    own = {
        name
        for name in optim_ext.__all__
        if getattr(getattr(optim_ext, name), "__module__", "torch").startswith("optim_ext")
    }
    assert {f"optim_ext.{name}" for name in own} - shown == set()
    assert {f"optim_ext.{module}" for module in ("utils", "swa_utils", "checkpoints", "math")} <= shown


MIGRATION = ROOT / "docs/migration.md"


def in_the_column_here():
    """What the tables of the page on migration say it is called here: (what others call it, code)."""
    for theirs, ours, remark in table_rows(MIGRATION):
        for code in re.findall(r"`([^`]+)`", ours) + re.findall(r"`(\w+\(params[^`]*\))`", remark):
            yield theirs, code


@pytest.mark.parametrize("theirs, code", list(in_the_column_here()), ids=str)
def test_what_migration_calls_it_is_what_it_is_called(theirs, code):
    names = readers_own()
    exec("import optim_ext\nfrom optim_ext import *\nfrom optim_ext import checkpoints, swa_utils, utils", names)
    model = names["model"]
    loss = names["loss"]
    loss.backward()
    names |= {
        "params": list(model.parameters()),
        "averaged": optim_ext.swa_utils.AveragedModel(model),
        "saved": copy.deepcopy(names["optimizer"].state_dict()),
    }
    if code.isidentifier() and code not in names:
        assert code in inspect.signature(optim_ext.AdamW).parameters, "is no option"
    else:
        eval(code, names)


def test_the_tables_of_migration_are_read():
    assert len(list(in_the_column_here())) > 40

from __future__ import annotations

import pytest

from plait.cost.calibration import load_calibration
from plait.cost.case import SkipRow, case_of
from plait.cost.table import read_table
from plait.errors import TableError

HEADER = (
    "id,source,model_name,params_b,layers,hidden,ffn_hidden,heads,kv_heads,vocab,seq_len,accelerator,n_accelerators,"
    "precision,micro_batch,global_batch,dp,tp,pp,sharding,activation_recompute,step_time_s,tokens_per_s_per_accel,notes"
)
ROW = "lab-1,lab,Llama 8B,8.03,32,4096,14336,32,8,128256,4096,NVIDIA H100 SXM5,8,bf16,1,16,8,1,1,fsdp,full,2.5,,"


def table(tmp_path, *lines, header=HEADER):
    path = tmp_path / "table.csv"
    path.write_text("\n".join([header, *lines]) + "\n", encoding="utf-8")
    return path


def case(tmp_path, line):
    return case_of(read_table(table(tmp_path, line))[0], load_calibration())


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (",32,4096,", ",many,4096,", "line 2: layers='many' is not a number"),
        (",32,4096,", ",-3,4096,", "layers=-3 is not a believable figure"),
        (",32,4096,", ",3.5,4096,", "layers=3.5 is not a whole number"),
        (",2.5,,", ",0,,", "step_time_s=0: leave a cell empty"),
        (",2.5,,", ",2.5,,a,b", "more cells than columns"),
    ],
)
def test_bad_cells_are_named(tmp_path, old, new, message):
    """Text where a number belongs is an error with its line, not a skipped row."""
    with pytest.raises(TableError, match=message) as problem:
        read_table(table(tmp_path, ROW.replace(old, new, 1)))
    assert problem.value.exit_status == 2


def test_a_table_without_architecture_cannot_be_read(tmp_path):
    """A needed column is named."""
    with pytest.raises(TableError, match="column 'layers' is missing"):
        read_table(table(tmp_path, header="id,accelerator,hidden,seq_len,n_accelerators,global_batch"))


def test_a_missing_file_is_an_error(tmp_path):
    """So is one that holds nothing."""
    with pytest.raises(TableError, match="No such file"):
        read_table(tmp_path / "none.csv")
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(TableError, match="it is empty"):
        read_table(tmp_path / "empty.csv")


def test_a_row_becomes_a_plan(tmp_path):
    """Degrees, sharding and batch are taken over; what is filled in is said."""
    found = case(tmp_path, ROW)

    assert (found.plan.fsdp, found.plan.zero, found.plan.microbatches, found.plan.recompute) == (8, 3, 2, "full")
    assert found.architecture.gated
    assert any("gated MLP" in text for text in found.filled)


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        (",32,4096,", ",,4096,", "layers is not given"),
        ("NVIDIA H100 SXM5", "H1000", "not in the catalogue"),
        (",16,8,1,1,", ",16,,,,", "parallel degrees are not given"),
        (",16,8,1,1,", ",16,4,1,1,", "is not n_accelerators"),
        (",16,8,1,1,", ",4,8,1,1,", "global_batch = 4 is below dp = 8"),
        (",bf16,", ",int3,", "precision 'int3' is not known"),
        (",fsdp,", ",magic,", "sharding 'magic' is not one of"),
    ],
)
def test_what_is_missing_is_the_reason(tmp_path, old, new, reason):
    """A row that lacks something is skipped with what it lacks."""
    with pytest.raises(SkipRow, match=reason):
        case(tmp_path, ROW.replace(old, new, 1))


def test_gpt_is_recognised_by_its_size(tmp_path):
    """Plain or gated is chosen so that the parameters match."""
    gpt = "lab-2,lab,GPT 1.3B,1.32,24,2048,8192,16,16,50304,2048,A100,8,fp16,1,64,8,1,1,none,none,2.5,,"
    found = case(tmp_path, gpt)

    assert not found.architecture.gated
    assert found.architecture.learned_positions


def test_nothing_recomputed_is_assumed_only_if_it_fits(tmp_path):
    """An empty recompute cell means the least that fits."""
    assert case(tmp_path, ROW.replace(",full,", ",,", 1)).open_recompute

"""A process that dies in the midst of a KV copy costs its peer nothing: neither its memory nor its work."""

import pytest

from tools.proofs.transfer_deaths import death_rows


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda:0", marks=pytest.mark.gpu)])
def test_deaths_in_the_midst_of_a_copy(device: str) -> None:
    rows = death_rows(device, device)
    assert not [row for row in rows if row.get("met") is False]
    assert {row["name"].split(": ")[1] for row in rows if "met" in row} == {"exporter killed", "importer killed"}

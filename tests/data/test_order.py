"""A query with an ORDER BY gives its rows in that order, however it is fetched and however many threads work."""

from __future__ import annotations

import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ftpipe.tables import connect


@pytest.mark.parametrize("threads", [1, 4])
def test_arrow_results_keep_the_order_of_the_query(tmp_path, threads):
    numbers = list(range(200_000))
    random.Random(0).shuffle(numbers)
    pq.write_table(pa.table({"i": numbers}), tmp_path / "t.parquet", row_group_size=10_000)
    query = f"select i from '{tmp_path}/t.parquet' order by i"
    with connect(threads=threads) as con:
        assert con.execute(query).to_arrow_table()["i"].to_pylist() == list(range(200_000))
        assert con.execute(query).to_arrow_reader(1000).read_all()["i"].to_pylist() == list(range(200_000))
        assert con.sql(query).to_arrow_table()["i"].to_pylist() == list(range(200_000))

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from gradcodec.entropy import TOTAL, SymbolReader, bits_of, encode_symbols, integer_table
from gradcodec.errors import CodecError


@given(st.lists(st.floats(1e-12, 1e3), min_size=2, max_size=300), st.data())
def test_symbols_come_back(weights: list[float], data: st.DataObject) -> None:
    table = integer_table(np.array(weights))
    assert int(table.astype(np.int64).sum()) == TOTAL
    assert table.min() >= 1
    runs = data.draw(st.lists(st.lists(st.integers(0, len(weights) - 1), max_size=30), max_size=4))
    symbols = [np.array(run, np.int32) for run in runs]
    reader = SymbolReader(encode_symbols([(run, table) for run in symbols]))
    for run in symbols:
        assert np.array_equal(reader.read(len(run), table), run)


def test_the_coder_reaches_the_entropy_within_two_words() -> None:
    generator = np.random.default_rng(0)
    weights = generator.dirichlet(np.full(200, 0.1))
    table = integer_table(weights)
    symbols = generator.choice(200, 5000, p=table / TOTAL).astype(np.int32)
    floor_bytes = bits_of(table)[symbols].sum() / 8
    assert floor_bytes <= len(encode_symbols([(symbols, table)])) + 1 <= floor_bytes + 9


@given(st.binary(max_size=40), st.integers(0, 200))
def test_any_bytes_give_known_symbols_or_codec_error(data: bytes, count: int) -> None:
    table = integer_table(np.array([0.9, 0.05, 0.05]))
    try:
        symbols = SymbolReader(data).read(count, table)
    except CodecError:
        return
    assert len(symbols) == count
    assert count == 0 or (symbols.min() >= 0 and symbols.max() < 3)


def test_golden_bytes_of_the_entropy_coder() -> None:
    """A newer constriction that codes differently would break every payload between old and new nodes."""
    table = integer_table(np.array([0.7, 0.2, 0.06, 0.04]))
    symbols = np.array([0, 0, 1, 3, 0, 2, 0, 0, 1, 0, 3, 3, 0, 0, 0, 1], np.int32)
    assert encode_symbols([(symbols, table), (symbols[::-1], table)]).hex() == "22488a7078312819"

"""The tree search against the same search written for one query block at a time."""

import pytest
import torch

from foveate.core.errors import ArgumentError
from foveate.routing import block_scores
from foveate.routing.block_scores import AskedBlocks
from foveate.routing.tree import search_products, search_rounds, search_tree


def plain(q, k, j, *, keys, block_q, block_k, group=1, window=0, official=False):
    """Blocks that query block j of one head keeps, in plain numbers."""
    n_q, n_k = q.shape[0], k.shape[0]
    rows = q[j * block_q : (j + 1) * block_q]
    end = (j + 1) * block_q + n_k - n_q
    parts = k.split(group)
    low, high = (torch.stack([getattr(p, how)(0).values for p in parts]) for how in ("min", "max"))
    if official:
        rows, seen = rows[1::2], min(end // group, len(parts))
        area = max(0, seen - window)
    else:
        area = seen = -(-max(0, min(end, n_k) - window) // group)
    m, most, blocks = -(-(keys // group) // block_k), keys // group, -(-area // block_k)
    if area <= most:
        return list(range(blocks))

    def score(block):
        units = slice(block * block_k, min((block + 1) * block_k, seen))
        return max(float((rows @ side[units].T).max()) for side in (low, high))

    segments = [(int(blocks / m * i), int(blocks / m * (i + 1)) - int(blocks / m * i)) for i in range(m)]
    share = blocks / m
    while share > 1 if official else max(size for _, size in segments) > 1:
        halves = [h for at, n in segments for h in ((at, n // 2), (at + n // 2, n - n // 2)) if h[1]]
        halves.sort(key=lambda h: -score(h[0] if official else h[0] + h[1] // 2))
        segments, share = halves[:m], share / 2
    return sorted(at for at, _ in segments)


CASES = [
    {"keys": 8, "block_q": 8, "block_k": 2, "window": 8},
    {"keys": 12, "block_q": 4, "block_k": 1, "window": 4},
    {"keys": 8, "block_q": 8, "block_k": 1, "group": 2, "window": 8},
    {"keys": 12, "block_q": 6, "block_k": 3, "group": 2, "window": 6},
    {"keys": 6, "block_q": 2, "block_k": 4, "window": 3},
]


@pytest.mark.parametrize("official", [False, True])
@pytest.mark.parametrize("options", CASES, ids=str)
@pytest.mark.parametrize(("n_q", "n_k"), [(96, 96), (60, 90)])
def test_equal_to_the_search_of_one_block(options, official, n_q, n_k):
    q, k = torch.randn(1, 2, n_q, 8, dtype=torch.float64), torch.randn(1, 1, n_k, 8, dtype=torch.float64)
    found = search_tree(q, k, official=official, **options)
    size = options["block_k"] * options.get("group", 1)
    for h in range(2):
        for j in range(n_q // options["block_q"]):
            kept = found.starts[0, h, j, : found.count[j]] // size
            assert kept.tolist() == plain(q[0, h], k[0, 0], j, official=official, **options), (h, j)


@pytest.mark.parametrize("official", [False, True])
@pytest.mark.parametrize("options", CASES, ids=str)
def test_tables_and_lookups_find_the_same(options, official, monkeypatch):
    q, k = torch.randn(2, 4, 77, 8, dtype=torch.float64), torch.randn(2, 2, 90, 8, dtype=torch.float64)
    kinds, found = [], []
    part = AskedBlocks._part
    monkeypatch.setattr(AskedBlocks, "_part", lambda self, *a: kinds.append(a[2].__name__) or part(self, *a))
    # Reading a key costs nothing, all there is, all there is and everything in small pieces.
    for read, sizes in ((-1e9, {}), (1e9, {}), (1e9, {"_ROWS": 24, "_PRODUCTS": 50, "_CHUNK": 300})):
        for name, value in {"_READ": read, **sizes}.items():
            monkeypatch.setattr(block_scores, name, value)
        found.append(search_tree(q, k, official=official, **options))
    assert kinds[0] == "Lookup"
    assert kinds[1] == "Table"
    assert kinds.count("Table") > 1
    assert len(kinds) > 3
    there = torch.arange(found[0].starts.shape[3]) < found[0].count[:, None]
    for other in found[1:]:
        assert other.count.equal(found[0].count)
        assert other.starts.masked_fill(~there, 0).equal(found[0].starts.masked_fill(~there, 0))


def test_the_cheaper_of_table_and_lookup_is_taken(monkeypatch):
    kinds = []
    part = AskedBlocks._part
    monkeypatch.setattr(AskedBlocks, "_part", lambda self, *a: kinds.append(a[2].__name__) or part(self, *a))
    q = torch.randn(1, 1, 4096, 4)
    # An eighth is kept: looking up takes as many scores as there are. A few are kept: it takes far fewer.
    search_tree(q[:, :, :1024], q[:, :, :1024], keys=128, block_q=8, block_k=2, window=128)
    assert set(kinds) == {"Table"}
    kinds.clear()
    search_tree(q, q, keys=8, block_q=32, block_k=1, window=32)
    assert kinds[-1] == "Lookup"
    kinds.clear()
    # One query reads a key for itself alone.
    search_tree(q[:, :, :1], q, keys=32, block_q=1, block_k=1, window=32)
    assert kinds == ["Lookup"]


def test_one_query_searches_as_a_row_of_many_does():
    q, k = torch.randn(2, 2, 80, 4), torch.randn(2, 2, 80, 4)
    options = {"keys": 6, "block_q": 1, "block_k": 1, "group": 2, "window": 4}
    whole = search_tree(q, k, **options)
    for t in (5, 40, 79):
        one = search_tree(q[:, :, t : t + 1], k[:, :, : t + 1], **options)
        n = int(one.count)
        assert n == int(whole.count[t])
        assert one.starts[:, :, 0, :n].equal(whole.starts[:, :, t, :n])


def test_an_oracle_keeps_the_best_block():
    q, k = torch.randn(2, 2, 64, 8), torch.randn(2, 2, 256, 8)
    found = search_tree(q, k, keys=16, block_q=16, block_k=4, window=16, oracle=True)
    scores = (q @ k.transpose(-1, -2)).unflatten(2, (4, 16)).amax(3)
    for j in range(4):
        area = 192 + 16 * (j + 1) - 16
        best = scores[:, :, j, :area].argmax(-1) // 4 * 4
        assert (found.starts[:, :, j] == best[..., None]).any(-1).all()


@pytest.mark.parametrize("at", [0, 3, 100, 517, 900])
@pytest.mark.parametrize("official", [False, True])
def test_a_needle_with_a_slope_around_it_is_always_found(at, official):
    q = torch.ones(1, 1, 8, 1)
    k = -(torch.arange(1024.0) - at).abs().view(1, 1, 1024, 1)
    found = search_tree(q, k, keys=8, block_q=8, block_k=1, window=16, official=official)
    nearest = (found.starts - at).abs().min()
    # Theirs may stop one halving early, with segments of two blocks of which it keeps the first.
    assert nearest <= (1 if official else 0)


def test_rounds_are_logarithmic():
    assert [search_rounds(blocks, 8) for blocks in (4, 8, 9, 16, 64, 1024)] == [0, 0, 1, 1, 3, 7]
    options = {"keys": 32, "block_q": 16, "block_k": 2, "group": 1, "window": 16}
    costs = [
        search_products(n, keep=16, **{k: v for k, v in options.items() if k != "keys"})
        for n in (1024, 2048, 4096)
    ]
    # N log N: doubling adds a round for every row, and far less than the fourfold of scoring everything.
    per_row = [cost / n for cost, n in zip(costs, (1024, 2048, 4096), strict=True)]
    steps = per_row[1] - per_row[0], per_row[2] - per_row[1]
    assert steps[0] == pytest.approx(2 * 32, rel=0.2)
    assert steps[1] == pytest.approx(2 * 32, rel=0.2)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"keys": 0}, "keys"),
        ({"keys": 2, "group": 4}, "keys"),
        ({"block_q": 0}, "block_q"),
        ({"block_k": 0}, "block_k"),
        ({"window": -1}, "window"),
        ({"block_q": 1, "official": True}, "block_q"),
    ],
)
def test_bad_arguments_are_named(options, name):
    q = torch.zeros(1, 1, 8, 4)
    with pytest.raises(ArgumentError, match=f"^{name}:"):
        search_tree(q, q, **{"keys": 4, "block_q": 2, "block_k": 1, **options})
    with pytest.raises(ArgumentError, match=r"^q:"):
        search_tree(q, q[:, :, :4], keys=4, block_q=2, block_k=1)

"""The interface: what every rule accepts, returns and rejects."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import rankseg
from rankseg import validation
from rankseg.exact import jacobi, laguerre

ALL = {
    "threshold": rankseg.threshold,
    "argmax": rankseg.argmax,
    "rankdice": rankseg.rankdice,
    "rankiou": rankseg.rankiou,
    "rankdice_trna": functools.partial(rankseg.rankdice, app=1),
    "rankdice_ba": functools.partial(rankseg.rankdice, app=2),
    "rankdice_paper": functools.partial(rankseg.rankdice, app=2, truncate_mean=True, variant="experiments"),
    "rankdice_nonoverlap": functools.partial(rankseg.rankdice, allow_overlap=False),
    "rankiou_nonoverlap": functools.partial(rankseg.rankiou, allow_overlap=False),
}


@pytest.fixture
def probs() -> torch.Tensor:
    return torch.softmax(3 * torch.randn(2, 3, 12, 10, generator=torch.Generator().manual_seed(0)), dim=1)


@pytest.mark.parametrize("name", list(ALL))
class TestEveryRule:
    def test_masks_and_untouched_input(self, name: str, probs: torch.Tensor) -> None:
        before = probs.clone()
        masks = ALL[name](probs.requires_grad_(True))
        assert masks.shape == probs.shape and masks.dtype == torch.bool and not masks.requires_grad
        assert torch.equal(probs, before)

    def test_layout_does_not_matter(self, name: str, probs: torch.Tensor) -> None:
        turned = probs.transpose(2, 3).contiguous().transpose(2, 3)
        assert torch.equal(ALL[name](turned), ALL[name](probs))
        wide = probs[:1].expand(4, -1, -1, -1)
        assert torch.equal(ALL[name](wide), ALL[name](probs[:1]).expand(4, -1, -1, -1))
        skipped = torch.stack([probs, probs], dim=-1)[..., 0]
        assert torch.equal(ALL[name](skipped), ALL[name](probs))

    @pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 1, 1), (1, 1, 1, 1), (2, 2, 3, 4, 5), (1, 2, 7)])
    def test_shapes(self, name: str, shape: tuple[int, ...]) -> None:
        maps = torch.rand(shape, generator=torch.Generator().manual_seed(1))
        assert ALL[name](maps).shape == shape

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_dtypes(self, name: str, dtype: torch.dtype, probs: torch.Tensor) -> None:
        assert ALL[name](probs.to(dtype)).shape == probs.shape

    def test_constant_maps(self, name: str) -> None:
        assert not ALL[name](torch.zeros(1, 2, 4, 4))[:, 1].any()
        assert ALL[name](torch.ones(1, 1, 4, 4)).all()

    @pytest.mark.parametrize(
        ("bad", "error", "words"),
        [
            (0.5, TypeError, "probs must be a torch.Tensor"),
            ([torch.rand(1, 4, 4), torch.rand(1, 5, 4)], TypeError, "got a list; call once for each"),
            (torch.rand(4, 4), ValueError, r"a single map \(H, W\) is probs\[None, None\]"),
            (torch.zeros(1, 2, 4, 4, dtype=torch.int64), TypeError, "int64"),
            (torch.zeros(4, 4), ValueError, r"\(N, C, \*S\)"),
            (torch.zeros(1, 0, 4), ValueError, "no class"),
            (torch.zeros(1, 2, 0, 4), ValueError, "empty spatial axis"),
            (torch.full((1, 1, 2), math.nan), ValueError, "NaN"),
            (torch.full((1, 1, 2), math.inf), ValueError, "inf"),
            (torch.tensor([[[0.2, -0.1]]]), ValueError, "softmax or sigmoid"),
            (torch.tensor([[[0.2, 1.1]]]), ValueError, "softmax or sigmoid"),
        ],
    )
    def test_rejections(self, name: str, bad: object, error: type[Exception], words: str) -> None:
        with pytest.raises(error, match=words):
            ALL[name](bad)


def test_values_outside_by_rounding_are_clamped() -> None:
    probs = torch.tensor([[[1 + 1e-6, -1e-7, 0.3]]])
    assert rankseg.rank_dice(probs).predict.tolist() == [[[True, False, False]]]
    assert probs[0, 0, 0] > 1


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"app": 3}, ValueError, "app must be one of 0, 1, 2"),
        ({"app": True}, ValueError, "app"),
        ({"smooth": -1.0}, ValueError, "smooth"),
        ({"smooth": math.inf}, ValueError, "smooth"),
        ({"smooth": "1"}, TypeError, "smooth"),
        ({"variant": "mine"}, ValueError, "'published', 'experiments'"),
        ({"truncate_mean": True}, ValueError, "app=1 or app=2"),
        ({"app": 2, "allow_overlap": False}, ValueError, "allow_overlap"),
    ],
)
def test_options_rejected(options: dict, error: type[Exception], words: str, probs: torch.Tensor) -> None:
    with pytest.raises(error, match=words):
        rankseg.rank_dice(probs, **options)


@pytest.mark.parametrize("device", ["cuda:99", "xpu:99", "nowhere"])
@pytest.mark.parametrize("rule", [rankseg.rank_dice, rankseg.rank_iou])
def test_a_device_that_is_not_there_is_rejected(rule, device: str, probs: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=rf"device='{device}' cannot be used .*; leave device out"):
        rule(probs, device=device)


def test_expected_scores_reject_other_masks(probs: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="shape of probs"):
        rankseg.expected_dice(probs, torch.zeros(1, 3, 12, 10, dtype=torch.bool))
    with pytest.raises(TypeError, match="bool"):
        rankseg.expected_iou(probs, torch.zeros(2, 3, 12, 10))
    with pytest.raises(ValueError, match="at must be"):
        rankseg.threshold(probs, at=2)


def test_published_call_and_result(probs: torch.Tensor, capsys: pytest.CaptureFixture) -> None:
    predict, tau, cutpoint = rankseg.rank_dice(probs, app=2, device="cpu", verbose=1)
    assert tau.dtype == torch.int64 and tau.shape == cutpoint.shape == (2, 3)
    assert torch.equal(predict.flatten(2).sum(2), tau)
    assert "volumes" in capsys.readouterr().out


def test_pruning() -> None:
    probs = torch.full((1, 1, 10, 10), 0.5)
    assert int(rankseg.rank_dice(probs).tau) == 0 and float(rankseg.rank_dice(probs).cutpoint) == 0.5
    full = rankseg.rank_dice(probs, pruning=False)
    assert int(full.tau) == 100 and float(full.cutpoint) == 0


def test_threshold_includes_its_level_and_argmax_takes_the_first() -> None:
    probs = torch.full((1, 2, 3), 0.5)
    assert rankseg.threshold(probs).all()
    assert rankseg.argmax(probs)[0].tolist() == [[True] * 3, [False] * 3]


@pytest.mark.parametrize("nodes", [8, 10, 16])
def test_laguerre_is_exact_for_polynomials(nodes: int) -> None:
    times, weights = laguerre(nodes)
    for power in range(2 * nodes):
        found = torch.exp(weights - times + power * torch.log(times)).sum()
        assert float(found) == pytest.approx(math.factorial(power), rel=1e-11)


@pytest.mark.parametrize("power", [0.0, 0.3, 0.75])
def test_jacobi_is_exact_for_polynomials(power: float) -> None:
    times, weights = jacobi(64, power)
    for degree in range(1, 128):
        found = torch.exp(weights - (degree + power) * times).sum()
        assert float(found) == pytest.approx(1 / (degree + power), rel=1e-11)


class WithMetadata(torch.Tensor):
    """A subclass in the way of MONAI's MetaTensor: attributes, and factory methods with signatures of its own."""

    def new_empty(self, size, dtype=None, device=None, requires_grad=False):  # type: ignore[override]
        return torch.empty(size=size, dtype=dtype or self.dtype, device=device or self.device).as_subclass(WithMetadata)


@pytest.mark.parametrize("name", list(ALL))
def test_subclasses_are_read_as_plain_tensors(name: str, probs: torch.Tensor) -> None:
    for maps in (probs.as_subclass(WithMetadata), torch.nn.Parameter(probs)):
        masks = ALL[name](maps)
        assert type(masks) is torch.Tensor and torch.equal(masks, ALL[name](probs))


@pytest.mark.parametrize("name", list(ALL))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_default_dtype_changes_nothing(name: str, dtype: torch.dtype) -> None:
    maps = torch.rand(1, 2, 80, 81, generator=torch.Generator().manual_seed(2))
    before = ALL[name](maps)
    torch.set_default_dtype(dtype)
    try:
        assert torch.equal(ALL[name](maps), before)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", list(ALL))
def test_the_default_device_changes_nothing(name: str, probs: torch.Tensor) -> None:
    """Neither for the call, nor, through the cached quadrature, for later ones."""
    before = ALL[name](probs)
    laguerre.cache_clear()
    jacobi.cache_clear()
    with torch.device("meta"):
        assert torch.equal(ALL[name](probs), before)
        masks = rankseg.expected_dice(probs, before)
    assert torch.equal(masks, rankseg.expected_dice(probs, before))
    assert torch.equal(ALL[name](probs), before)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("bad", "error", "words"),
    [
        (lambda p: torch.nested.nested_tensor([p[0], p[0, :, :4]]), TypeError, "nested"),
        (lambda p: torch.nested.nested_tensor([p[0], p[1]], layout=torch.jagged), TypeError, "nested"),
        (lambda p: p.to_sparse(), TypeError, "to_dense"),
        (lambda p: p.flatten(0, 1).flatten(1).to_sparse_csr(), TypeError, "to_dense"),
        (lambda p: p.to("meta"), TypeError, "meta"),
    ],
)
def test_tensors_without_dense_values_are_rejected(bad, error, words, probs: torch.Tensor) -> None:
    for rule in ALL.values():
        with pytest.raises(error, match=words) as caught:
            rule(bad(probs))
        assert "\n" not in str(caught.value)


TRANSFORMED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    **{name: ALL[name] for name in ("threshold", "rankdice", "rankiou", "rankdice_nonoverlap")},
    "argmax": rankseg.argmax,
    "rank_dice": lambda p: rankseg.rank_dice(p).predict,
    "rank_iou": lambda p: rankseg.rank_iou(p).predict,
    "expected_dice": lambda p: rankseg.expected_dice(p, torch.ones(p.shape, dtype=torch.bool)),
    "confidence": lambda p: rankseg.confidence(p, torch.ones(p.shape, dtype=torch.bool)),
    "label_map": lambda p: rankseg.label_map(torch.ones(p.shape, dtype=torch.bool), probs=p),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TRANSFORMED)
def test_transforms_are_rejected_in_one_line(name: str, probs: torch.Tensor) -> None:
    function = TRANSFORMED[name]

    class Module(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return function(x)

    for transform, words in (
        (lambda: torch.func.vmap(function)(probs[None]), "vmap.*unsupported"),
        (lambda: torch.jit.trace(Module(), probs), "jit.trace.*unsupported"),
        (lambda: torch.export.export(Module(), (probs,)), "export.*unsupported"),
        (lambda: make_fx(lambda x: function(x))(probs), "make_fx.*unsupported"),
        (lambda: function(FakeTensorMode().from_tensor(probs)), "FakeTensorMode.*unsupported"),
        (lambda: function(probs.to("meta")), "meta.*no values"),
    ):
        with pytest.raises(TypeError, match=words) as caught:
            transform()
        assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore")
def test_compilation_runs_the_function_itself_or_is_rejected(probs: torch.Tensor) -> None:
    """The compiled function is tried on other values than those it was compiled with. Nothing inside it is compiled."""
    others = probs.flip(-1) ** 3
    for name in ("rank_dice", "rankiou"):
        torch._dynamo.reset()
        function = TRANSFORMED[name]
        compiled = torch.compile(lambda x, function=function: function(x), backend="eager")
        torch._dynamo.utils.counters.clear()
        for values in (probs, others):
            assert torch.equal(compiled(values), function(values))
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 0
        torch._dynamo.reset()
        since_2_7 = hasattr(torch.compiler, "is_exporting")  # before, torch does not show our reason
        reason = r"unsupported inside of a graph.*call it outside" if since_2_7 else r"disable\(\) wrapped"
        with pytest.raises(torch._dynamo.exc.Unsupported, match=reason):
            torch.compile(lambda x, function=function: function(x), backend="eager", fullgraph=True)(probs)


def test_rules_work_without_what_torch_2_6_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    class Torch26:
        compiler = object()  # without is_exporting
        __getattr__ = staticmethod(functools.partial(getattr, torch))

    monkeypatch.setattr(validation, "torch", Torch26())
    assert validation.check_probs(torch.full((1, 1, 2, 2), 0.9)).shape == (1, 1, 2, 2)


@pytest.mark.filterwarnings("ignore")
def test_scripting_is_rejected_in_one_line() -> None:
    for name in rankseg.__all__:
        function = getattr(rankseg, name)
        if name in ("RankResult", "Predictor", "backend", "calibration"):
            continue
        with pytest.raises(RuntimeError, match=f"{name} is unsupported by torch.jit.script") as caught:
            torch.jit.script(function)
        assert "\n" not in str(caught.value)


class OfMPS(torch.Tensor):
    """A tensor that claims to be on a Mac's GPU."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> OfMPS:
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, device="mps", dtype=inner.dtype)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} was called, which is not known to work there")


def test_a_device_without_float64_is_rejected_in_one_line(probs: torch.Tensor) -> None:
    for rule in TRANSFORMED.values():
        with pytest.raises(TypeError, match=r"mps.*float64.*cpu\(\)"):
            rule(OfMPS(probs))
    for rule in (rankseg.rank_dice, rankseg.rank_iou):
        with pytest.raises(ValueError, match=r"device='mps'.*float64"):
            rule(probs, device="mps")


def test_numpy_numbers_are_numbers(probs: torch.Tensor) -> None:
    plain, numpy = (
        rankseg.rank_dice(probs, app=app, smooth=smooth) for app, smooth in ((2, 1.5), (np.int64(2), np.float32(1.5)))
    )
    assert torch.equal(plain.predict, numpy.predict)
    assert torch.equal(rankseg.threshold(probs, at=np.float64(0.3)), rankseg.threshold(probs, at=0.3))


@pytest.mark.parametrize("smooth", [1.1e15, 4e38, 1e300, math.nan, np.float64(4e38)])
def test_smooth_has_a_limit(smooth: float, probs: torch.Tensor) -> None:
    for call in (rankseg.rank_dice, rankseg.rank_iou):
        with pytest.raises(ValueError, match=r"smooth=.*1e\+15"):
            call(probs, smooth=smooth)
    with pytest.raises(ValueError, match=r"smooth=.*1e\+15"):
        rankseg.expected_iou(probs, probs > 0.5, smooth=smooth)


@pytest.mark.parametrize("smooth", [5e-324, 1e-310, 1e-308, 1e-300])
@pytest.mark.parametrize("allow_overlap", [True, False])
def test_a_subnormal_smooth_is_read_as_nearly_0(smooth: float, allow_overlap: bool, probs: torch.Tensor) -> None:
    """1 / smooth overflows."""
    for call, expected in ((rankseg.rank_dice, rankseg.expected_dice), (rankseg.rank_iou, rankseg.expected_iou)):
        found, known = (
            call(probs, smooth=x, pruning=False, allow_overlap=allow_overlap).predict for x in (smooth, 1e-100)
        )
        assert torch.equal(found, known) and found.any()
        scores, same = (expected(probs, found, smooth=x) for x in (smooth, 1e-100))
        torch.testing.assert_close(scores, same, rtol=1e-12, atol=0)


def test_imports_torch_alone() -> None:
    """The package works with torch and the standard library, and so does every module of it."""
    import ast
    import sys
    from pathlib import Path

    for file in Path(rankseg.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                top = name.split(".")[0]
                allowed = {"torch", "rankseg"} | ({"triton"} if file.stem == "triton_kernels" else set())
                assert top in allowed or top in sys.stdlib_module_names, (file.name, name)


@pytest.mark.parametrize("rule", [rankseg.rank_dice, rankseg.rank_iou])
def test_flags_are_true_or_false(rule, probs: torch.Tensor) -> None:
    """The text "false" is true in Python."""
    for flag in ("allow_overlap", "pruning"):
        for value in ("false", None, 2):
            with pytest.raises(TypeError, match=flag):
                rule(probs, **{flag: value})
        assert torch.equal(rule(probs, **{flag: np.bool_(False)}).predict, rule(probs, **{flag: False}).predict)

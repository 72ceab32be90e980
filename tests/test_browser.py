"""JAX functions as JavaScript: every primitive against JAX on random inputs, and whole predictions, run by Node."""

import json
import shutil
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from diffspec.browser.blocks import flatten
from diffspec.browser.elementwise import ELEMENTWISE
from diffspec.browser.emit import VIEWS
from diffspec.browser.shaped import SHAPED
from diffspec.browser.translate import runtime, translate
from diffspec.results import InputError

NODE = shutil.which("node") or shutil.which("nodejs")
needs_node = pytest.mark.skipif(NODE is None, reason="needs Node.js (node), which is absent")


def run_node(calls):
    """Results of [(text of a function, its name, arguments), ...], each a list of arrays, by one Node process."""
    texts = [text for text, _, _ in calls]
    lines = [runtime(texts), *texts, "const out=[];"]
    for _, name, arguments in calls:
        given = ",".join(as_javascript(value) for value in arguments)
        lines.append(f"out.push({name}({given}).map(v=>Array.from(ArrayBuffer.isView(v)?v:[v],x=>String(+x))));")
    lines.append("console.log(JSON.stringify(out));")
    ran = subprocess.run([NODE, "-"], input="\n".join(lines), capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr[-2000:]
    return [[np.array([float(x) for x in leaf]) for leaf in leaves] for leaves in json.loads(ran.stdout)]


def as_javascript(value) -> str:
    array = np.asarray(value)
    texts = [{"inf": "Infinity", "-inf": "-Infinity", "nan": "NaN"}.get(t := str(v).lower(), t) for v in array.ravel()]
    if array.size == 1:
        return texts[0]
    kind = "Uint8Array" if array.dtype == bool else "Float64Array"
    return f"{kind}.of({','.join(t.replace('true', '1').replace('false', '0') for t in texts)})"


rng = np.random.default_rng(7)
REAL, POSITIVE, UNIT = rng.normal(size=(3, 4)), rng.uniform(0.1, 5.0, (3, 4)), rng.uniform(-0.95, 0.95, (3, 4))
OTHER = rng.normal(size=(3, 4))
WHOLE, DIVISOR = rng.integers(-9, 10, (3, 4)), rng.integers(1, 5, (3, 4))
FLAGS, MORE_FLAGS = REAL > 0, OTHER > 0
EDGES = np.array([np.nan, np.inf, 1e308, -np.inf])
TIES = np.array([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 0.2, 7.7])
CUBE = rng.normal(size=(2, 3, 4))
POINTWISE = {
    **{name: (name, (REAL, OTHER)) for name in ("add", "sub", "mul", "max", "min", "eq", "ne", "lt", "le", "gt", "ge")},
    **{name: (name, (REAL,)) for name in ("neg", "sign", "abs", "floor", "ceil", "exp", "exp2", "expm1", "square")},
    **{name: (name, (POSITIVE,)) for name in ("log", "log1p", "sqrt", "rsqrt", "cbrt")},
    **{name: (name, (UNIT,)) for name in ("sin", "cos", "tan", "asin", "acos", "atan", "sinh", "cosh", "tanh")},
    **{name: (name, (3.0 * REAL,)) for name in ("logistic", "erf", "erfc")},
    **{"div": ("div", (REAL, POSITIVE)), "rem": ("rem", (REAL, POSITIVE)), "pow": ("pow", (POSITIVE, REAL))},
    **{"atan2": ("atan2", (REAL, OTHER)), "is_finite": ("is_finite", (EDGES,))},
    **{name: (name, (FLAGS, MORE_FLAGS)) for name in ("and", "or", "xor")} | {"not": ("not", (FLAGS,))},
}
LAX = {"and": "bitwise_and", "or": "bitwise_or", "xor": "bitwise_xor", "not": "bitwise_not"}


def pointwise(name):
    return getattr(lax, LAX.get(name, name))


CASES = {
    **{key: (pointwise(name), values) for key, (name, values) in POINTWISE.items()},
    "whole numbers": (lambda a, b: (lax.div(a, b), lax.rem(a, b), a + b, a * b, jnp.bitwise_not(a)), (WHOLE, DIVISOR)),
    "add_any": (jax.grad(lambda x: x * jnp.sin(x) + jnp.exp(x)), (0.3,)),
    "integer_pow": (lambda x: tuple(lax.integer_pow(x, n) for n in (-3, -2, -1, 2, 3, 5)), (REAL,)),
    "round": (lambda x: (lax.round(x), lax.round(x, lax.RoundingMethod.TO_NEAREST_EVEN)), (TIES,)),
    "clamp": (lambda x: lax.clamp(-0.5, x, 0.5), (REAL,)),
    "select_n": (lambda p, a, b: lax.select(p, a, b), (FLAGS, REAL, OTHER)),
    "select_n of three": (lambda n, a: lax.select_n(n.astype(jnp.int32) % 3, a, 2 * a, 3 * a), (DIVISOR, REAL)),
    "convert_element_type": (
        lambda x, b: (x.astype(int), (x > 0).astype(float) * 1.5, b.astype(float), x.astype(bool)),
        (REAL, FLAGS),
    ),
    "one number": (lambda a, b: (a * b + a / b, jnp.where(a > b, a, b), -(a + b), a - (b - a)), (0.7, -2.0)),
    "iota": (lambda x: (lax.iota(float, 5) * x, lax.broadcasted_iota(float, (2, 3), 1) + x), (2.0,)),
    "broadcast_in_dim": (lambda x, y: x[:, None] * y[None, :] + jnp.broadcast_to(x[0], (3, 4)), (REAL[:, 0], REAL[0])),
    "slice": (lambda x: (x[1:, ::2] * 2.0, x[2, 1], x[1:2, 1:2] + 1.0), (REAL,)),
    "transpose": (lambda x: (jnp.transpose(x, (2, 0, 1)) + 1.0, jnp.sin(x).T), (CUBE,)),
    "rev": (lambda x: (x[::-1] * 1.0, jnp.flip(x, (0, 1)) + x), (REAL,)),
    "reshape": (lambda x: (x.reshape(4, 3) + 1.0, jnp.squeeze(x[None]), x[:1, :1].reshape(())), (REAL,)),
    "concatenate": (lambda x, y: (jnp.concatenate([x, y, x[:, :1]], 1), jnp.stack([x[0], y[1]])), (REAL, OTHER)),
    "reductions": (
        lambda x: tuple(f(x, axis=a) for f in (jnp.sum, jnp.prod, jnp.max, jnp.min) for a in (None, 0, 1, (0, 2))),
        (CUBE,),
    ),
    "reductions of flags": (lambda p: (p.any(), p.all(), p.any(0), p.all(1)), (FLAGS,)),
    "argmax": (lambda x: (jnp.argmax(x), jnp.argmin(x, 1), jnp.argmax(x, 0)), (REAL,)),
    "cumulative": (
        lambda x: (jnp.cumsum(x, 1), jnp.cumprod(x, 0), lax.cummax(x, 1, reverse=True), lax.cummin(x, 0)),
        (REAL,),
    ),
    "cumlogsumexp": (lambda x: lax.cumlogsumexp(x, 1), (REAL,)),
    "dot_general": (
        lambda x, y, z: (x @ y.T, x[0] @ y[0], jnp.einsum("bij,bkj->bik", z, z), jnp.tensordot(z, z, 3)),
        (REAL, OTHER, CUBE),
    ),
    "gather": (
        lambda x, n: (x[n], x[:, n], x[n, n], jnp.take(x, n, axis=1, mode="clip"), x[n[0]]),
        (REAL, WHOLE[0] % 3),
    ),
    "dynamic_slice": (lambda x, n: (lax.dynamic_slice(x, (n, 1), (2, 2)), lax.dynamic_index_in_dim(x, n)), (REAL, 2)),
    "dynamic_update_slice": (lambda x, n: lax.dynamic_update_slice(x, 2.0 * x[:2, :2], (n, 1)), (REAL, 2)),
    "cond": (lambda p, x: lax.cond(p > 0, lambda: (x * 2, x[0]), lambda: (-x, x[1])), (1.0, REAL[0])),
    "switch": (lambda n, x: [lax.switch(n + k, [jnp.sin, jnp.cos, jnp.exp], x) for k in range(-1, 4)], (0, 0.4)),
    "while": (
        lambda x, y: lax.while_loop(lambda c: c[0] < 40.0, lambda c: (c[1] + c[0], c[0] * y, c[2] / 2), (x, y, REAL)),
        (1.0, 1.5),
    ),
    "fori": (lambda x: lax.fori_loop(0, 5, lambda i, c: (c[1], c[0] + i.astype(float) * x), (x, 2.0 * x)), (REAL[0],)),
    "scan": (
        lambda x, s: lax.scan(lambda c, r: (c + jnp.sum(r) * s, (c * r, c, r > 0)), 0.0, x, reverse=True),
        (REAL, 0.5),
    ),
    "scan of a scan": (
        lambda x: lax.scan(lambda c, r: (lax.scan(lambda d, e: (d * 0.5 + e + x[0, 0], None), c, r)[0], c), 1.0, x),
        (REAL,),
    ),
    "one step of a scan": (lambda x: lax.scan(lambda c, r: (c + r, (c - r, x * c)), 1.0, x[:1]), (REAL[0],)),
    "root": (
        lambda a, b: lax.custom_root(
            lambda x: a * x**3 - b,
            1.0,
            lambda f, s: lax.fori_loop(0, 30, lambda _, x: x - f(x) / (3 * a * x**2), s),
            lambda f, y: y / f(1.0),
        ),
        (2.0, 3.0),
    ),
    "custom rules": (lambda x: jax.nn.softplus(x) + jax.nn.relu(x) + jax.nn.logsumexp(x), (REAL,)),
    "vmap of jit": (lambda x: jax.vmap(jax.jit(lambda r: jnp.where(r > 0, r, 0.0).sum() * r))(x), (CUBE,)),
    "derivative": (jax.value_and_grad(lambda x: jnp.sum(jnp.exp(-(x**2)) / (1 + x**2))), (REAL[0],)),
    "constants": (lambda x: x * jnp.asarray(OTHER) + jnp.full((3, 4), 2.0) * jnp.asarray(FLAGS).astype(float), (REAL,)),
    "edges": (lambda x: (jnp.maximum(x, 0.0), jnp.exp(x), x > 1, jnp.sum(x[:3])), (EDGES,)),
}


@pytest.fixture(scope="module")
def translated():
    """{case: (what JAX computes, what Node computes)}, of arguments in 64 bits."""
    calls, wanted = [], {}
    for place, (case, (function, values)) in enumerate(CASES.items()):
        arguments = [jnp.asarray(value) for value in values]
        calls.append((translate(f"f{place}", function, *arguments), f"f{place}", values))
        wanted[case] = [np.asarray(leaf, dtype=float).reshape(-1) for leaf in jax.tree.leaves(function(*arguments))]
    return dict(zip(CASES, zip(wanted.values(), run_node(calls), strict=True), strict=True))


@needs_node
@pytest.mark.parametrize("case", CASES)
def test_javascript_computes_what_jax_does(translated, case):
    wanted, got = translated[case]
    assert len(wanted) == len(got)
    for mine, theirs in zip(wanted, got, strict=True):
        np.testing.assert_allclose(theirs, mine, rtol=2e-13, atol=1e-15)


def test_every_rule_is_tried():
    met = set()

    def walk(block):
        for step in block.steps:
            met.add(step.name)
            for inner in step.blocks:
                walk(inner)

    for function, values in CASES.values():
        walk(flatten(jax.make_jaxpr(function)(*(jnp.asarray(value) for value in values))))
    assert sorted({*ELEMENTWISE, *SHAPED, *VIEWS, "iota", "scan", "while", "cond"} - met) == []


@pytest.mark.parametrize(
    ("function", "values", "named"),
    [
        (jnp.sort, (REAL,), "sort"),
        (lambda x: x.at[jnp.array([0, 1])].set(1.0), (REAL,), "scatter"),
        (lambda x: lax.population_count(x), (WHOLE,), "population_count"),
        (lambda x: x & 3, (WHOLE,), "'and' of whole numbers"),
        (lambda x: x.astype(jnp.float32), (REAL,), "float32"),
        (lambda x: lax.complex(x, x), (REAL,), "complex128"),
    ],
)
def test_what_is_not_translated_is_named(function, values, named):
    with pytest.raises(InputError, match=f"got .*{named}.*; allowed"):
        translate("f", function, *(jnp.asarray(value) for value in values))


def test_an_elementwise_chain_is_one_loop_that_stores_its_result_alone():
    text = translate("f", lambda x, y: jnp.sum(jnp.exp(x) * 2.0 + y / x), jnp.ones(9), 3.0)
    assert text.count("new Float64Array") == 1 and text.count("for(") == 2


def test_equal_steps_unused_steps_and_steps_of_constants_are_not_written():
    def wasteful(x):
        unused = jnp.exp(x)
        del unused
        return jnp.sin(x) + jnp.sin(x) * jnp.cos(jnp.asarray(0.5))

    text = translate("f", wasteful, 0.3)
    assert text.count("Math.") == 1 and "Math.sin" in text and "0.8775825618903728" in text


def test_what_a_loop_does_not_change_is_computed_before_it():
    text = translate("f", lambda x, n: lax.fori_loop(0, 9, lambda i, c: c * jnp.sqrt(x), n), 2.0, 3.0)
    assert text.index("Math.sqrt") < text.index("for(")


def test_the_runtime_holds_what_is_called_alone():
    text = translate("f", lax.erfc, 1.0)
    assert "function erfc" in runtime([text]) and "function erf(" in runtime([text])  # one calls the other
    assert "gather" not in runtime([text]) and runtime(["f(x)"]) == ""

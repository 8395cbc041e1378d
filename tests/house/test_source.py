"""No source file unpickles or runs text, and every model is loaded with trust_remote_code set."""

import ast
from pathlib import Path

import pytest

from tests.support import ROOT

CODE = [
    path
    for folder in ("recipes", "evaluate", "train", "scripts")
    for path in sorted((ROOT / folder).rglob("*.py"))
]
UNPICKLERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
CALLS = {
    *("eval", "exec", "compile", "__import__", "torch.load", "np.load", "numpy.load"),
    *("pd.read_pickle", "pandas.read_pickle", "yaml.load", "yaml.unsafe_load", "yaml.full_load"),
    *("os.system", "os.popen", "torch.hub.load", "torch.jit.load", "importlib.import_module"),
}
SWITCHES = {"allow_pickle": True, "weights_only": False, "trust_remote_code": True, "shell": True}


NO_CODE = ("PeftModel", "PeftConfig", "GenerationConfig")  # classes that load none of a model


def forbidden(tree: ast.AST) -> list[str]:
    """Return the names in a source that can unpickle, or run text as code."""
    dangerous = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        else:
            names = []
        dangerous += [name for name in names if name.split(".")[0] in UNPICKLERS]
        if isinstance(node, ast.Call):
            if ast.unparse(node.func) in CALLS:
                dangerous.append(ast.unparse(node.func))
            given = [(keyword.arg, keyword.value) for keyword in node.keywords]
        elif isinstance(node, ast.Dict):
            keys = [key.value if isinstance(key, ast.Constant) else None for key in node.keys]
            given = list(zip(keys, node.values, strict=True))
        else:
            given = []
        for name, value in given:
            wrong = SWITCHES.get(name or "")
            if wrong is not None and isinstance(value, ast.Constant) and value.value is wrong:
                dangerous.append(f"{name}={wrong}")
    return dangerous


def test_search_finds_dangerous_calls() -> None:
    for line in (
        "import pickle", "from joblib import load", "torch.load(p)", "eval(t)",
        "np.load(p, allow_pickle=True)", "f(weights_only=False)", "yaml.load(t, Loader=L)",
        "f(**{'trust_remote_code': True})",
    ):  # fmt: skip
        assert forbidden(ast.parse(line)), line
    assert not forbidden(ast.parse("model.eval(); yaml.safe_load(t); f(trust_remote_code=x)"))


@pytest.mark.parametrize("path", CODE, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_file_unpickles_or_runs_text(path: Path) -> None:
    assert forbidden(ast.parse(path.read_text(encoding="utf-8"))) == []


def test_every_from_pretrained_sets_trust_remote_code() -> None:
    """Without it, transformers asks on the terminal."""
    num_calls = 0
    for path in CODE:
        if path.parent == ROOT / "scripts/benchmarks":
            continue  # these scripts load models that they have made themselves
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            if node.func.attr != "from_pretrained":
                continue
            num_calls += 1
            keywords = {keyword.arg for keyword in node.keywords}
            loads_no_code = ast.unparse(node.func.value) in NO_CODE
            assert loads_no_code or keywords & {"trust_remote_code", None}, f"{path}:{node.lineno}"
    assert num_calls > 5

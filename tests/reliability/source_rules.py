"""What the product's sources must not do with data that others made: rules over the syntax tree."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("native", "pipelines", "model", "train", "tools", "benchmarks")

PICKLING_MODULES = {"pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "jsonpickle"}
CODE_FROM_TEXT = {"eval", "exec", "compile", "__import__"}
SHELLS = {"os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput", "commands.getoutput"}
YAML_LOADERS = {"yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load"}
PICKLING_COLLECTIVES = {  # torch.distributed's: they unpickle what other ranks send
    "all_gather_object",
    "broadcast_object_list",
    "gather_object",
    "scatter_object_list",
    "send_object_list",
    "recv_object_list",
}
WRITABLE_BY_ALL = 0o002


def broken_rules(source):
    """(rule, line) for each thing that a source does and must not."""
    tree = ast.parse(source)
    names = _imported_names(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            if any(module.split(".")[0] in PICKLING_MODULES for module in modules):
                yield "imports a module that unpickles", node.lineno
        elif isinstance(node, ast.Call):
            rule = _broken_by_call(node, _dotted(node.func, names))
            if rule:
                yield rule, node.lineno


def sources():
    """Every source of the product: (path from the root, text)."""
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            yield path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")


def _broken_by_call(call, name):
    """The rule that a call breaks, or None."""
    last = name.rpartition(".")[2]
    arguments = {keyword.arg: keyword.value for keyword in call.keywords}
    broken = {
        "makes code from text": name in CODE_FROM_TEXT,
        "starts a shell": name in SHELLS or not _is(arguments.get("shell"), False),
        "names a temporary file without making it": name == "tempfile.mktemp",
        "torch.load without weights_only=True": name == "torch.load" and not _is(arguments.get("weights_only"), True),
        "loads arrays with pickle": not _is(arguments.get("allow_pickle"), False),
        "yaml without a safe loader": name in YAML_LOADERS and not _has_safe_loader(call),
        "a collective that unpickles": last in PICKLING_COLLECTIVES,
        "makes a file that all may write": last in ("chmod", "umask", "mkdir", "open") and _gives_to_all(call, last),
    }
    return next((rule for rule, is_broken in broken.items() if is_broken), None)


def _has_safe_loader(call):
    given = [*call.args[1:2], *(keyword.value for keyword in call.keywords if keyword.arg == "Loader")]
    return any(
        _dotted(loader, {}).rpartition(".")[2] in ("SafeLoader", "CSafeLoader", "_PlainLoader") for loader in given
    )


def _gives_to_all(call, last):
    values = [*call.args, *(keyword.value for keyword in call.keywords if keyword.arg == "mode")]
    modes = [value.value for value in values if isinstance(value, ast.Constant) and type(value.value) is int]
    return any(bool(mode & WRITABLE_BY_ALL) != (last == "umask") for mode in modes)


def _is(node, value):
    """Whether an argument is not given, for False, or is that constant."""
    return value is False if node is None else isinstance(node, ast.Constant) and node.value is value


def _imported_names(tree):
    """{name here: what it stands for} of the imports."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return names


def _dotted(node, names):
    """`a.b.c` of an expression, with imported names put in; else its last part."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    parts.append(names.get(node.id, node.id) if isinstance(node, ast.Name) else "")
    return ".".join(reversed(parts))

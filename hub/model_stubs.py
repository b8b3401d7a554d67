"""Write `dcp_zoo/models.pyi`, in which editors and type checkers find a function for every model of the zoo:

    python hub/model_stubs.py

Run it after a change of `dcp_zoo/zoo/models.yaml` or of the parameters of `create_model`; a test fails if
the stub is outdated.
"""

import ast
from pathlib import Path

import dcp_zoo
from dcp_zoo.zoo.specs import MODELS

PACKAGE = Path(dcp_zoo.__file__).parent
FACTORY = PACKAGE / "zoo" / "factory.py"
STUB = PACKAGE / "models.pyi"


def stub() -> str:
    """The text of the stub: the imports that annotations need, and a function for each model."""
    module = ast.parse(FACTORY.read_text())
    definitions = [node for node in module.body if isinstance(node, ast.FunctionDef)]
    create_model = next(definition for definition in definitions if definition.name == "create_model")
    used = {node.id for node in ast.walk(create_model.args) if isinstance(node, ast.Name)}
    imports = ["# written by hub/model_stubs.py"]
    for node in module.body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            node.names = [alias for alias in node.names if alias.name in used]
            if node.names:
                imports.append(ast.unparse(node))
    parameters = "".join(f"    {parameter},\n" for parameter in parameters_of(create_model))
    functions = []
    for name, spec in MODELS.items():
        clip = f"{spec.clip}/{spec.clip_pretrained}" if spec.clip else "the bundled miniature"
        docstring = f"{clip}; see `create_model`, and the row in zoo/models.yaml."
        functions.append(f'def {name}(\n{parameters}) -> Any:\n    """{docstring}"""\n')
    text = "\n".join(imports) + "\n\n" + "\n".join(functions)
    return text.replace("'", '"')


def parameters_of(function: ast.FunctionDef) -> list[str]:
    """The parameters of `create_model` in source code, without the name of the model."""
    (pretrained,) = function.args.defaults
    texts = [f"{ast.unparse(function.args.args[1])} = {ast.unparse(pretrained)}", "*"]
    for parameter, default in zip(function.args.kwonlyargs, function.args.kw_defaults, strict=True):
        assert default is not None
        texts.append(f"{ast.unparse(parameter)} = {ast.unparse(default)}")
    assert function.args.kwarg is not None
    return [*texts, f"**{ast.unparse(function.args.kwarg)}"]


if __name__ == "__main__":
    STUB.write_text(stub())

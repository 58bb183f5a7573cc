"""Bad options, recipes and outputs for ``compress run``: what is wrong, and the id and exit code that must come."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

from bad_inputs import BadInput, Bench, Spoil, folder, nothing, write

A_TO_H, B_TO_I = "abcdefgh", "bcdefghi"


def _pruning() -> Iterator[BadInput]:
    for share in ("0", "1", "-0.1", "1.1", "nan", "inf", "50%", "half"):
        option = f"--sparsity={share}"
        yield BadInput(f"sparsity {share}", "E-SPARSITY-RANGE", 2, f"got {share}", (option,))
    assigned = ("--set", "pruning.sparsity=1.5")
    yield BadInput("sparsity set to 1.5", "E-SPARSITY-RANGE", 2, "got 1.5", assigned)
    for pattern in ("2:2", "0:4", "5:4", "0:0"):
        yield BadInput(f"pattern {pattern}", "E-PATTERN-RANGE", 2, pattern, ("--pattern", pattern))
    for pattern in ("a:b", "2", "2:4:8", "-1:4", "2/4", "", "1.5:4", "9999999:9999999"):
        yield BadInput(f"pattern {pattern!r}", "E-PATTERN-SYNTAX", 2, "N:M", (f"--pattern={pattern}",))
    both = ("--sparsity", "0.5", "--pattern", "2:4")
    yield BadInput("sparsity and pattern", "E-SPARSITY-AND-PATTERN", 2, "not both", both)
    yield BadInput("pattern that does not divide", "E-PATTERN-DIVIDES", 3, "--ignore", ("--pattern", "3:7"))
    nowhere = ("--ignore", "*.w_proj")
    yield BadInput("ignore that matches nothing", "E-IGNORE-NO-MATCH", 2, "*.w_proj", nowhere)
    regex = ("--ignore", "re:[")
    yield BadInput("ignore that is no regex", "E-IGNORE-REGEX", 2, "re:[", regex)
    yield BadInput("ignore everything", "E-IGNORE-EVERYTHING", 2, "--ignore", ("--ignore", "*"))


def _settings() -> Iterator[BadInput]:
    def option(name: str, error_id: str, says: str, *words: str) -> BadInput:
        return BadInput(name, error_id, 5 if error_id == "E-DEVICE-ABSENT" else 2, says, words)

    def recipe(name: str, error_id: str, says: str, text: str | bytes) -> BadInput:
        return BadInput(name, error_id, 2, says, ("--recipe", "{home}/r.yaml"), write("r.yaml", text))

    yield option("unknown option", "E-USAGE", "--nonsense", "--nonsense")
    yield option("unknown pruner", "E-USAGE", "magnitude", "--pruner", "obs")
    yield option("unknown recovery", "E-USAGE", "ebft", "--recovery", "qlora")
    yield option("unknown dtype", "E-USAGE", "bfloat16", "--dtype", "float8")
    yield option("unknown encoding", "E-USAGE", "sparse", "--encoding", "zip")
    yield option("unknown device", "E-USAGE", "cuda:N", "--device", "tpu")
    yield option("device that is absent", "E-DEVICE-ABSENT", "cuda:99", "--device", "cuda:99")
    yield option("unknown provider", "E-PROVIDER-UNKNOWN", "nonsense", "--provider", "nonsense")
    yield option("unknown check", "E-CHECK-NAME", "parity-prefill", "--require", "parity")
    yield option("opset too low", "E-RECIPE-VALUE", "export.opset", "--opset", "11")
    yield option("opset too high", "E-RECIPE-VALUE", "export.opset", "--opset", "99")
    yield option("no windows", "E-RECIPE-VALUE", "evaluation.max_windows", "--max-eval-windows", "0")
    yield option("negative seed", "E-RECIPE-VALUE", "seed", "--seed=-1")
    yield option("gate that is no number", "E-USAGE", "15%", "--max-abs-error", "small")
    yield option("gate above its range", "E-RECIPE-VALUE", "gates.min_sparsity", "--min-sparsity", "110%")
    yield option("setting that nobody has", "E-RECIPE-KEY", "export.opset", "--set", "export.opsets=18")
    yield option("setting without a value", "E-SET-SYNTAX", "KEY=VALUE", "--set", "recovery.lr")
    yield option(
        "setting of a tag", "E-SET-SYNTAX", "recovery.lr", "--set", "recovery.lr=!!python/name:os.system"
    )
    yield option("setting of no date", "E-SET-SYNTAX", "recovery.lr", "--set", "recovery.lr=2026-13-45")
    yield option("setting below a value", "E-RECIPE-KEY", "--set: unknown key seed.x", "--set", "seed.x=1")
    yield option("recipe that nobody has", "E-RECIPE-NOT-FOUND", "did you mean", "--recipe", "ebft-papr")
    yield option("recipe of a long name", "E-RECIPE-NOT-FOUND", "aaa", "--recipe", 300 * "a")
    yield recipe(
        "recipe with an unknown key", "E-RECIPE-KEY", "did you mean recovery.epochs?", "recovery: {epoch: 3}"
    )
    yield recipe("recipe with an unknown section", "E-RECIPE-KEY", "did you mean pruning?", "prunning: {}")
    yield recipe("recipe with a tag", "E-RECIPE-SYNTAX", "tags", "seed: !!python/object/apply:os.system [id]")
    yield recipe("recipe that is a list", "E-RECIPE-SYNTAX", "mapping", "- 1")
    yield recipe("recipe that is no YAML", "E-RECIPE-SYNTAX", "r.yaml", "a: [")
    yield recipe("recipe with no date", "E-RECIPE-SYNTAX", "r.yaml", "seed: 2026-13-45")
    yield recipe("recipe not UTF-8", "E-RECIPE-SYNTAX", "r.yaml", b"seed: \xff\xfe\x00")
    yield recipe("recipe with a wrong value", "E-RECIPE-VALUE", "recovery.epochs", "recovery: {epochs: many}")
    yield recipe("recipe with a section of text", "E-RECIPE-VALUE", "pruning", "pruning: fast")
    deep = "[" * 3000 + "]" * 3000
    yield recipe("recipe that nests without end", "E-RECIPE-SYNTAX", "r.yaml", f"seed: {deep}")
    # Each list holds the one before it nine times: a billion times ``x`` for a reader that copies.
    steps = [
        f"{name}: &{name} [{','.join(9 * ['*' + before])}]"
        for before, name in zip(A_TO_H, B_TO_I, strict=True)
    ]
    bomb = "\n".join(["a: &a [x, x]", *steps])
    yield recipe("recipe that expands without end", "E-RECIPE-SYNTAX", "more than 50000 values", bomb)


def _run_settings() -> Iterator[BadInput]:
    def option(name: str, says: str, *words: str) -> BadInput:
        return BadInput(name, "E-RECIPE-VALUE", 2, says, words)

    yield option("no epochs", "recovery.epochs", "--epochs", "0")
    yield option("rate not a number", "recovery.lr", "--lr", "nan")
    yield option("rate of zero", "recovery.lr", "--lr", "0")
    yield option("no batch", "recovery.batch_size", "--batch-size", "0")
    yield option("no samples", "calibration.num_samples", "--num-calibration-samples", "0")
    yield option("window of no token", "calibration.seqlen", "--seqlen", "0")
    yield option("window of one token", "calibration.seqlen", "--seqlen", "1")
    yield option("samples without bound", "calibration.num_samples", "--num-calibration-samples", str(10**12))
    twice = ("--epochs", "2", "--set", "recovery.epochs=3")
    yield BadInput("setting given twice", "E-SET-TWICE", 2, "recovery.epochs", twice)


def _outputs() -> Iterator[BadInput]:
    def out(name: str, error_id: str, says: str, place: str, spoil: Spoil = nothing) -> BadInput:
        code, force = 2 if error_id == "E-OUTPUT-NAME" else 6, error_id != "E-OUTPUT-EXISTS"
        return BadInput(name, error_id, code, says, ("--out", place), spoil, force=force)

    def only_report_left(bench: Bench) -> None:
        for path in bench.out.parent.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.suffix != ".html":
                path.unlink()

    yield out("output exists", "E-OUTPUT-EXISTS", "--force", "{out}")
    yield out("one product exists", "E-OUTPUT-EXISTS", "sparse.report.html", "{out}", only_report_left)
    yield out("output folder not empty", "E-OUTPUT-EXISTS", "--force", "{home}/out")
    yield out("parent missing", "E-OUTPUT-PARENT", "mkdir -p", "{home}/no/sparse.onnx")
    yield out(
        "parent is a file", "E-OUTPUT-PARENT", "x.jsonl", "{home}/x.jsonl/sparse.onnx", write("x.jsonl", "{}")
    )
    yield out("folder as file", "E-OUTPUT-KIND", "is a folder", "{home}/x.onnx", folder("x.onnx"))
    yield out("file as folder", "E-OUTPUT-KIND", "not a folder", "{home}/calibration.jsonl")
    yield out("output in the model", "E-OUTPUT-IS-INPUT", "outside", "{model}/sparse.onnx")
    yield out("output is the model", "E-OUTPUT-IS-INPUT", "outside", "{model}")
    yield out("no name", "E-OUTPUT-NAME", "names no file", "")
    yield out("only an ending", "E-OUTPUT-NAME", "names no file", "{home}/.onnx")
    yield out("parent with a line break", "E-OUTPUT-PARENT", r"x\ny", "{home}/x\ny/sparse.onnx")
    yield out(
        "output of a long name", "E-OUTPUT-NOT-WRITABLE", "shorter name", "{home}/out/" + 300 * "a" + ".onnx"
    )


PRUNING = tuple(_pruning())
SETTINGS = (*_settings(), *_run_settings())
OUTPUTS = tuple(_outputs())

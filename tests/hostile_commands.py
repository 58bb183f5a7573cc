"""More that can be wrong: hidden places of an output, grids of comparisons, exports with links and pipes."""

from __future__ import annotations

import json
from collections.abc import Iterator

from bad_inputs import Bench, Spoil, nothing, write
from hostile_cases import BOMB, INPUTS, HostileCase, pipe, run_case


def _places() -> Iterator[HostileCase]:
    """Outputs, and what lies in their hidden places."""

    def bad(name: str, error_id: str, says: str, spoil: Spoil, *options: str) -> HostileCase:
        return run_case(name, error_id, 6, says, spoil, *options)

    def to_secrets(place: str) -> Spoil:
        def spoil(bench: Bench) -> None:
            (bench.home / "secrets").mkdir()
            (bench.home / "secrets" / "kept").write_text("kept", encoding="utf-8")
            (bench.home / place).symlink_to(bench.home / "secrets")

        return spoil

    kind = "E-OUTPUT-KIND"
    state, staging = "out/.sparse.onnx.state", "out/.sparse.onnx.staging"
    yield bad("state linked out", kind, "no folder of its own", to_secrets(state))
    yield bad("staging linked out", kind, "no folder of its own", to_secrets(staging))
    never = ("--resume", "never")
    yield bad("state linked out and forgotten", kind, "no folder", to_secrets(state), *never)
    yield bad("state that is a file", kind, "no folder", write(state, "x"))
    yield bad("staging that is a pipe", kind, "no folder", pipe(staging))
    inside = ("--out", "{home}/out")
    yield bad("state linked out of a folder", kind, "no folder", to_secrets("out/.blockpress.state"), *inside)
    yield bad(
        "staging linked out of a folder", kind, "no folder", to_secrets("out/.blockpress.staging"), *inside
    )
    yield bad("output a device", kind, "/dev/null", nothing, "--out", "/dev/null")
    yield bad("output a pipe", kind, "p.onnx", pipe("p.onnx"), "--out", "{home}/p.onnx")

    def journal(**content: object) -> Spoil:
        def spoil(bench: Bench) -> None:
            (bench.home / staging / "new").mkdir(parents=True)
            text = json.dumps({"leaving": [], "coming": [], **content})
            (bench.home / staging / "journal.json").write_text(text, encoding="utf-8")

        return spoil

    for name in ("../calibration.jsonl", "..", "", "thesis.txt", "a\0b"):
        spoil = journal(leaving=[name])
        yield bad(f"journal that takes away {name!r}", "E-OUTPUT-JOURNAL", "journal.json", spoil)
    yield bad("journal that brings", "E-OUTPUT-JOURNAL", "journal.json", journal(coming=["/tmp/x.onnx"]))
    choice = ("--resume", "perhaps")
    yield run_case("choice of resuming", "E-USAGE", 2, "auto", nothing, *choice)
    required = ("--resume", "required")
    yield run_case("nothing to resume", "E-RESUME-NONE", 6, "--resume", nothing, *required)


def _comparisons() -> Iterator[HostileCase]:
    axes = "pruners: [magnitude]\nrecoveries: [none]\nsparsities: [0.5]\n"

    def bad(
        name: str, error_id: str, code: int, says: str, *options: str, spoil: Spoil = nothing
    ) -> HostileCase:
        words = ("compare", "{model}", "--out", "{home}/results", *options)
        return HostileCase(f"comparison {name}", error_id, code, says, words, spoil)

    def grid(name: str, error_id: str, says: str, text: str) -> HostileCase:
        return bad(name, error_id, 2, says, "--grid", "{home}/g.yaml", spoil=write("g.yaml", text))

    yield grid("of a billion values", "E-GRID-SYNTAX", "values", f"{BOMB}pruners: *x8\n")
    yield grid("that holds itself", "E-GRID-SYNTAX", "alias", "set: &a {x: *a}\n")
    yield grid("with a tag", "E-GRID-SYNTAX", "tags", "set: !!python/object/apply:os.system [id]\n")
    yield grid("with a key twice", "E-GRID-SYNTAX", "twice", f"{axes}masks: own\nmasks: own\n")
    yield grid("that is no YAML", "E-GRID-SYNTAX", "g.yaml", "a: [")
    yield grid("that is a list", "E-GRID-SYNTAX", "mapping", "- 1")
    yield grid("of nothing", "E-GRID-SYNTAX", "mapping", "")
    yield grid("without pruners", "E-GRID-VALUE", "pruners", "recoveries: [none]\nsparsities: [0.5]\n")
    yield grid(
        "with a misspelt key", "E-GRID-KEY", "did you mean pruners?", axes.replace("pruners", "pruner")
    )
    yield grid("of a share of 1.5", "E-GRID-VALUE", "sparsities", axes.replace("0.5", "1.5"))
    yield grid("of a share that is no number", "E-GRID-VALUE", "sparsities", axes.replace("0.5", ".nan"))
    yield grid("of a pattern without quotes", "E-GRID-VALUE", "quotes", f"{axes}patterns: [2:4]\n")
    yield grid("of a pattern that is none", "E-PATTERN-SYNTAX", "N:M", f'{axes}patterns: ["2/4"]\n')
    yield grid("of no such pruner", "E-GRID-METHOD", "magnitude", axes.replace("magnitude", "magnitud"))
    yield grid(
        "that sets what it varies", "E-GRID-AXIS", "pruners", f"{axes}set: {{pruning.method: wanda}}\n"
    )
    yield grid(
        "that sets what nobody has", "E-RECIPE-KEY", "recovery.lr", f"{axes}set: {{recovery.lrr: 1}}\n"
    )
    yield bad("without its grid", "E-GRID-NOT-FOUND", 2, "no.yaml", "--grid", "{home}/no.yaml")
    pipes = pipe("g.yaml")
    yield bad("with a pipe as grid", "E-GRID-NOT-FOUND", 2, "g.yaml", "--grid", "{home}/g.yaml", spoil=pipes)
    yield bad("with a device as grid", "E-GRID-NOT-FOUND", 2, "/dev/zero", "--grid", "/dev/zero")
    yield bad("with no such preset", "E-GRID-NOT-FOUND", 2, "quick", "--preset", "quik")
    both = ("--preset", "quick", "--pruners", "magnitude")
    yield bad("with a grid twice", "E-GRID-TWICE", 2, "exclude", *both)
    yield bad("into a file", "E-OUTPUT-KIND", 2, "folder", "--out", "{home}/x.onnx")
    strangers = ("--out", "{home}/out")
    yield bad("into a folder of others", "E-OUTPUT-EXISTS", 6, "--force", *strangers)

    def linked_state(bench: Bench) -> None:
        (bench.home / "results").mkdir()
        (bench.home / "secrets").mkdir()
        (bench.home / "results" / ".compare").symlink_to(bench.home / "secrets")

    away = ("--force",)
    yield bad("with its state linked out", "E-OUTPUT-KIND", 6, ".compare", *away, spoil=linked_state)


def _validations() -> Iterator[HostileCase]:
    def bad(name: str, error_id: str, says: str, spoil: Spoil, command: str = "validate") -> HostileCase:
        return HostileCase(f"export whose {name}", error_id, 3, says, (command, "{out}"), spoil)

    def linked_in_a_circle(bench: Bench) -> None:
        data = bench.home / "out" / "sparse.onnx.data"
        data.unlink()
        data.symlink_to("sparse.onnx.data")

    def linked_licence(bench: Bench) -> None:
        (bench.home / "out" / "sparse.hf" / "LICENSE").unlink()
        (bench.home / "out" / "sparse.hf" / "LICENSE").symlink_to("/proc/self/environ")

    listed = write("out/sparse.manifest.json", "[]")
    yield bad("manifest is a list", "E-MANIFEST-UNREADABLE", "not a JSON object", listed)
    circle, data = linked_in_a_circle, "sparse.onnx.data"
    yield bad("data is a link in a circle", "E-MANIFEST-MISMATCH", data, circle)
    yield bad("data is a link in a circle (inspect)", "E-ONNX-DATA-MISSING", data, circle, "inspect")
    yield bad("licence is a link", "E-MODEL-FILE-ESCAPES", "LICENSE", linked_licence)
    masks = pipe("out/sparse.hf/masks.safetensors")
    yield bad("masks are a pipe", "E-MODEL-FILE-ESCAPES", "masks.safetensors", masks)


CASES = (*INPUTS, *_places(), *_comparisons(), *_validations())

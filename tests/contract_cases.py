"""Each thing that can go wrong with a run, and the tests and cases that try it.

``file::function`` is a test; anything else is the name of a case in ``bad_inputs``, ``bad_options``, ``bad_exports``,
``hostile_cases`` or ``hostile_commands``.
"""

from __future__ import annotations

TRIED: dict[str, tuple[str, ...]] = {
    "kill -9 at every stage": (
        "test_resume.py::test_run_killed_again_and_again_ends_as_if_nothing_had_happened",
        "test_publish.py::test_publish_killed_midway_is_completed_by_the_next_run",
    ),
    "disk full at each write": (
        "test_resume.py::test_full_disk_leaves_the_commit_before",
        "test_resume.py::test_disk_that_takes_no_more_ends_with_5",
    ),
    "NaN or infinite weights": ("weight not a number", "weight infinite", "weight beyond float16"),
    "NaN or infinite activations and losses": (
        "test_statistics.py::test_non_finite_inputs_are_refused_by_name",
        "test_recover_ebft.py::test_non_finite_loss_at_step_0_is_refused",
        "test_recover_ebft.py::test_divergence_stops_and_falls_back",
    ),
    "singular Hessian": (
        "test_prune_sparsegpt.py::test_indefinite_hessian_raises_the_damping_then_gives_up",
        "test_prune_sparsegpt.py::test_dead_columns_go_first_and_lose_nothing_beyond_the_mask",
    ),
    "safetensors truncated": ("weights cut in the header", "weights cut in the tensors", "weights empty"),
    "safetensors with holes and overlaps": ("weights with a hole", "weights that overlap"),
    "doubled header key": ("header with a key twice", "index with a tensor in two shards"),
    "missing shard": ("shard missing", "index with a missing shard"),
    "index pointing outside": ("shard outside", "test_path_escapes.py::test_name_leads_nowhere"),
    "pickles only": ("pickle only", "pickled shards", "index with a pickle as shard"),
    "absurd sizes in the config": ("absurd vocabulary", "absurd depth", "negative size", "number beyond 2^53"),
    "keys of the config that reach the loader": ("config key of the loader", "config that asks for code"),
    "token ids beyond the embedding": (
        "tokenizer beyond the embedding",
        "tokenizer with ids of 2^31",
        "test_models_checkpoint.py::test_checkpoint_only_warns_of_config_ids",
    ),
    "unsupported architecture": ("unsupported architecture", "no model type", "encoder", "multimodal"),
    "tied weights": (
        "test_models_writer.py::test_writer_stores_tied_weights_once",
        "test_pipeline.py::test_pipeline_output_validates_again",
    ),
    "N:M that does not divide": ("pattern that does not divide",),
    "sparsity out of range": (
        "sparsity 0", "sparsity 1", "sparsity -0.1", "sparsity 1.1", "sparsity nan", "sparsity 50%",
    ),
    "ignore pattern that matches nothing": ("ignore that matches nothing",),
    "unknown recipe key": ("recipe with an unknown key", "setting that nobody has"),
    "YAML tags": ("recipe with a tag", "comparison with a tag", "test_canaries.py::test_canary_in_a_tag_is_not_run"),
    "calibration of nothing": ("--calibration empty", "--calibration of spaces"),
    "calibration that is too short": ("--calibration too short", "--eval-data too short"),
    "calibration that is not UTF-8": ("--calibration not UTF-8", "--calibration in UTF-16"),
    "bad JSONL line": ("--calibration with a bad line", "--calibration with a line that is no object"),
    "output exists": ("output exists", "one product exists", "output folder not empty"),
    "output is a folder": ("folder as file", "file as folder"),
    "output's parent is missing": ("parent missing", "parent is a file"),
    "output cannot be written": (
        "test_bad_input.py::test_bad_input_places_that_cannot_be_written",
        "output of a long name",
    ),
    "eight processes on one output": ("test_resume.py::test_eight_runs_on_one_output_have_one_winner",),
    "stale lock": ("test_lock.py::test_lock_of_a_killed_run_is_free",),
    "ONNX truncated": ("graph cut", "cut graph", "empty graph"),
    "external data missing or altered": ("data missing", "absent data", "data with one byte altered"),
    "external data that escapes": ("data as link out", "data at an absolute path", "data with a second name"),
    "pipes": ("data as pipe", "pipe as file", "config.json a pipe", "recipe a pipe"),
    "swapped while validating": ("test_validate_structure.py::test_file_swapped_while_validating_is_refused",),
    "file beyond 2 GiB": (
        "test_export_read.py::test_file_beyond_protobuf_is_refused",
        "test_export_wire.py::test_graph_beyond_protobuf_is_refused_before_writing",
    ),
    "closed stdout": (
        "test_cli_entry.py::test_cli_closed_stdout_is_quiet",
        "test_cli_inspect.py::test_cli_inspect_reader_that_is_gone_is_no_error",
    ),
    "no terminal, NO_COLOR": (
        "test_cli_displays.py::test_cli_displays_no_color_is_honoured",
        "test_cli_displays.py::test_cli_displays_dumb_terminal_gets_plain_lines",
    ),
    "offline, with the cache and without": (
        "hub id offline",
        "--calibration on the hub",
        "test_hub_models.py::test_hub_model_comes_from_the_cache_when_the_hub_is_gone",
    ),
    "tokens in logs and messages": ("test_cli_run.py::test_cli_run_bug_leaves_its_traceback_in_the_log",),
    "names in the report": (
        "test_report_html.py::test_report_page_escapes_every_name",
        "test_compare_table.py::test_compare_page_escapes_names",
        "test_canaries.py::test_canary_in_a_models_folder_is_not_run",
    ),
    "state of another run": ("test_resume.py::test_state_of_other_settings_is_refused_with_what_differs",),
    "damaged state": ("test_resume.py::test_damaged_commit_falls_back_to_the_one_before",),
    "validation that hangs, dies or takes all memory": (
        "test_validate_child.py::test_child_beyond_its_time_is_ended",
        "test_validate_child.py::test_child_beyond_its_memory_limit_is_ended",
        "test_validate_child.py::test_crash_in_native_code_is_an_error_of_the_input",
    ),
}  # fmt: skip

"""Which test runs which fault of the outside. The numbers are those of the review that found them, worst first.

| fault | what happened | tests |
|---|---|---|
| F1 | torchrun's stores listen on all interfaces | test_sockets: test_ranks_of_one_machine_meet_without_a_store_that_listens, test_a_flow_with_all_its_stages, test_servers |
| F2 | a web page runs code through Prefect | test_strangers: test_strangers_are_refused_on_every_route, test_a_page_cannot_create_a_deployment_and_the_project_can |
| F3 | a value of params.yaml reaches a shell | test_sockets: test_no_value_of_params_stands_in_a_command, test_no_command_is_built_for_a_shell |
| F4 | mlflow.db is left half made | test_first_start: test_the_second_start_works_after_blows_at_any_moment, test_a_half_made_database_is_made_anew |
| F5 | one bad reply locks a shard | test_replies: test_one_bad_reply_is_one_rejected_row, test_a_journal_that_holds_a_bad_reply_is_resumed |
| F6 | a checkpoint's record widens trust | test_target_configs: test_a_record_in_a_checkpoint_gives_neither_commit_nor_trust |
| F7 | an MLflow outage loses points | test_store_away: test_a_server_that_fails_in_every_way_gets_each_point_once |
| F8 | a run stays RUNNING | test_store_away: test_a_stage_succeeds_though_its_end_cannot_be_sent |
| F9 | servers outlive a killed flow | test_servers_killed: test_make_run_leaves_nothing_and_the_next_call_resumes, test_make_serve_restarts_what_dies_and_leaves_nothing_when_killed |
| F10 | damaged caches are trained on | test_digests: test_no_damaged_file_is_used, test_features_that_were_damaged_are_named_before_a_step |
| F11 | a full disk is a bug line | test_digests: test_a_full_disk_is_one_line_whoever_met_it |
| F12 | passwords in logs and databases | test_secrets: test_a_stage_leaves_no_secret_whether_it_succeeds_or_fails, test_a_flow_that_fails_leaves_no_secret |
| F13 | a locked database is a bug line | test_store_away: test_a_database_locked_at_the_start_is_one_line |
| F14 | odd YAML is a bug line | test_fuzz_params: test_any_bytes_in_the_file_are_read_or_refused_in_one_line, test_hostile_yaml_is_refused_in_one_line |
| F15 | odd manifests and JSON are bug lines | test_fuzz_data: test_a_manifest_that_is_changed_anywhere, test_a_manifest_that_exhausts_a_reader |
| F16 | another world size starts anew in silence | test_world_size: test_ranks_may_change_between_calls, test_the_split_of_a_batch_does_not_name_the_work |
| F17 | a kill loses points | test_store_away: test_no_kill_loses_a_point_or_tells_it_twice |
| F18 | escapes reach the terminal | test_outside_text: test_escapes_in_rows_reach_no_terminal, test_escapes_in_responses_reach_no_terminal |
| F19 | a link in place of a lock or a journal | test_outside_text: test_what_stands_in_place_of_a_file_of_ours_stays_as_it_is |
| F20 | a name that MLflow refuses is found out late | test_uris: test_names_that_mlflow_or_the_disk_refuse_are_refused_at_once |
| F21 | a broken pipe fails a stage | test_signals: test_output_that_nobody_reads_is_dropped, test_a_stage_whose_reader_is_gone_saves_a_checkpoint_when_it_is_stopped |
| F22 | one dead worker ends the service | test_servers_killed: test_make_serve_restarts_what_dies_and_leaves_nothing_when_killed, test_what_keeps_ending_is_named_and_given_up |
| F23 | SIGHUP is not handled | test_signals: test_random_blows, test_every_signal_has_a_documented_exit |
| F24 | a damaged mlflow.db is a bug line | test_first_start: test_a_damaged_database_is_one_line_that_says_what_to_do |
| F25 | a manifest leads out of its folder, or lost a shard | test_fuzz_data: test_a_manifest_s_paths_stay_inside_for_every_reader, test_a_manifest_that_lost_a_shard_is_not_trained_on |
| F26 | another run's checkpoint is registered | test_digests: test_another_runs_checkpoint_is_not_registered |
| F27 | values that no run can have | test_fuzz_params: test_values_that_no_run_can_have_are_refused_by_their_key |
| F28 | a key with a line break is a bug line | test_server_words: test_a_key_that_no_header_may_hold_is_a_config_error |
| F29 | replies are believed | test_replies: test_what_a_text_spells_is_never_a_special_token, test_a_response_longer_than_asked_for_is_flagged_and_one_far_longer_rejected |
| F30 | passwords in dvc.lock | test_secrets: test_params_hold_no_secret |
| F31 | YAML is read otherwise than by DVC | test_fuzz_params: test_a_file_is_read_as_dvc_reads_it_or_refused |
| F32 | a second run gets DVC's advice | test_orphans: test_a_second_run_names_the_first_and_starts_nothing, test_a_run_beside_dvc_names_it_and_does_not_advise_to_delete_its_lock |
| F33 | files ignore the umask | test_strangers: test_files_follow_the_umask_and_secrets_are_private |
| F34 | replies in flight take gigabytes | test_replies: test_replies_far_beyond_what_was_asked_for_take_no_memory, test_all_replies_in_flight_share_one_bound |
| F35 | pickled weights | test_target_configs: test_pickled_weights_are_not_read |
| F36 | a template that never ends | test_chat_templates: test_a_template_that_does_not_end_or_eats_memory_is_one_line |
| F37 | a recipe's name leads out of the folder | test_uris: test_names_that_mlflow_or_the_disk_refuse_are_refused_at_once |
| F38 | registered and trained bytes are one | test_digests: test_registered_bytes_are_their_own |
"""  # noqa: E501

import ast
import re
from pathlib import Path

FOLDER = Path(__file__).parent


def test_each_fault_has_a_test_that_is_there() -> None:
    rows = dict(re.findall(r"^\| (F\d+) \| .* \| (.*) \|$", str(__doc__), re.MULTILINE))
    assert list(rows) == [f"F{number}" for number in range(1, 39)]
    for fault, place in rows.items():
        file, _, names = place.partition(": ")
        tree = ast.parse((FOLDER / f"{file}.py").read_text())
        there = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert set(names.split(", ")) <= there, (fault, set(names.split(", ")) - there)

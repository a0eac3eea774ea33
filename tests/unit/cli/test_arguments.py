import json
import re
from pathlib import Path

import pytest

from batchcls.cli.arguments import add_settings, parser_for, read_settings
from batchcls.config.bundle_config import BundleCreateConfig
from batchcls.config.classify_config import ClassifyConfig
from batchcls.config.common_config import JobConfig
from batchcls.errors import InputError

REQUIRED = ["--manifest", "m.parquet", "--output", "out", "--model", "timm:resnet18"]


def parse(arguments: list[str], settings: type[JobConfig] = ClassifyConfig) -> JobConfig:
    parser = parser_for("prog", "", "")
    add_settings(parser, settings)
    return read_settings(settings, parser.parse_args(arguments))


def test_every_setting_has_a_flag_and_a_help_text():
    parser = parser_for("prog", "", "")
    add_settings(parser, ClassifyConfig)
    text = parser.format_help()
    for name, field in ClassifyConfig.model_fields.items():
        assert "--" + name.replace("_", "-") in text
        assert field.description
        assert field.description[0].isupper() or field.description.startswith("auto")
        assert field.description.endswith(".")


def test_flags_take_precedence_over_the_file(tmp_path: Path):
    file = tmp_path / "job.toml"
    file.write_text('manifest = "a"\noutput = "b"\nmodel = "timm:resnet18"\ntop-k = 3\nbatch_size = 8\n')
    config = parse(["--config", str(file), "--top-k", "7"])
    assert isinstance(config, ClassifyConfig)
    assert (config.top_k, config.batch_size, config.manifest) == (7, 8, str(Path("a").absolute()))


def test_values_are_typed(tmp_path: Path):
    config = parse(
        [
            *REQUIRED,
            *("--batch-size", "auto", "--max-actors", "3", "--keep", "price,shop", "--keep", "size"),
            *("--storage-options", '{"anon": true}', "--no-publish", "--cpus-per-actor", "0.5"),
        ]
    )
    assert isinstance(config, ClassifyConfig)
    assert (config.batch_size, config.max_actors, config.cpus_per_actor) == ("auto", 3, 0.5)
    assert config.keep == ["price", "shop", "size"]
    assert config.storage_options == {"anon": True}
    assert config.publish is False


def test_three_numbers_are_read_as_a_mean():
    config = parse(["--model", "timm:x", "--output", "o", "--mean", "0.5,0.4,0.3"], BundleCreateConfig)
    assert isinstance(config, BundleCreateConfig)
    assert config.mean == (0.5, 0.4, 0.3)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["--manifest is required", "--output is required", "--model is required"]),
        ([*REQUIRED, "--batch-size", "many"], ["--batch-size"]),
        ([*REQUIRED, "--batch-size", "0"], ["--batch-size: should be 'auto' or greater than or equal to 1"]),
        ([*REQUIRED, "--max-failed-fraction", "2"], ["should be 'auto' or less than or equal to 1"]),
        ([*REQUIRED, "--top-k", "0"], ["--top-k", "1"]),
        ([*REQUIRED, "--no-such-flag"], ["--no-such-flag", "--help"]),
        ([*REQUIRED, "--storage-options", "anon"], ["JSON"]),
        ([*REQUIRED, "--run-id", "../elsewhere"], ["--run-id", "letters"]),
        ([*REQUIRED, "--keep", "label"], ["--keep", "label", "rename"]),
        ([*REQUIRED, "--ray-address", "ray://head:10001"], ["--ray-address", "ray job submit"]),
        ([*REQUIRED, "--config", "nowhere.toml"], ["nowhere.toml", "no such file"]),
        ([*REQUIRED, "--embedding-dtype", "float64"], ["--embedding-dtype", "float16"]),
    ],
)
def test_error_of_an_invalid_setting_names_its_flag(arguments: list[str], words: list[str]):
    with pytest.raises(InputError) as caught:
        parse(arguments)
    for word in words:
        assert word in str(caught.value)


def test_an_unknown_setting_in_a_file_suggests_the_right_one(tmp_path: Path):
    file = tmp_path / "job.toml"
    file.write_text("batchsize = 3\n")
    with pytest.raises(InputError, match="batchsize; did you mean batch_size"):
        parse([*REQUIRED, "--config", str(file)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--modle", "x"], "unrecognized argument --modle; did you mean --model?; see prog --help"),
        (["--modle=secret"], "unrecognized argument --modle; did you mean --model?; see prog --help"),
        (
            ["--modle", "x", "--tpo-k", "3"],
            "did you mean --model?; unrecognized argument --tpo-k; did you mean --top-k?",
        ),
        (["--zzzzzz"], "unrecognized argument --zzzzzz; see prog --help"),
        (["catalog.parquet"], "unrecognized argument catalog.parquet; see prog --help"),
    ],
)
def test_an_unknown_flag_suggests_the_closest(arguments: list[str], message: str):
    with pytest.raises(InputError) as caught:
        parse([*REQUIRED, *arguments])
    assert message in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("{notfound = 0.002}", "unknown key notfound; did you mean not_found?"),
        ("{zzzzzz = 0.002}", "unknown key zzzzzz; it should be 'null_id', "),
        ("{not_found = 2}", "not_found should be less than or equal to 1"),
    ],
)
def test_error_of_a_table_names_its_key(tmp_path: Path, table: str, message: str):
    file = tmp_path / "job.toml"
    file.write_text(f"[gates]\nmax_failed_fraction_by_reason = {table}\n")
    with pytest.raises(InputError) as caught:
        parse([*REQUIRED, "--config", str(file)])
    assert str(caught.value).startswith(f"--gate-max-failed-fraction-by-reason: {message}")


def test_recorded_settings_contain_no_secrets():
    options = {"key": "AKIASECRET", "secret": "s3cr3t", "endpoint_url": "http://store:9000"}
    config = parse(
        [*REQUIRED, "--storage-options", json.dumps(options), "--weights", "s3://who:s3cr3t@bucket/w"]
    )
    assert isinstance(config, ClassifyConfig)
    text = json.dumps(config.redacted())
    assert "AKIASECRET" not in text
    assert "s3cr3t" not in text
    assert "http://store:9000" in text


GROUPS = ("input and output", "model", "engine", "resources", "publishing and gates", "fetching")
ESSENTIAL = {"manifest", "model", "output", "top_k", "reuse", "limit", "device", "batch_size"} | {
    "max_failed_fraction",
    "publish",
}


def test_every_flag_of_classify_is_in_a_group():
    parser = parser_for("prog", "", "")
    add_settings(parser, ClassifyConfig)
    groups = {group.title: [a.dest for a in group._group_actions] for group in parser._action_groups[2:]}
    assert set(groups) == set(GROUPS)
    grouped = [name for names in groups.values() for name in names]
    assert sorted(grouped) == sorted(ClassifyConfig.model_fields)


def test_help_of_classify_fits_on_one_screen(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("COLUMNS", "100")
    texts = {}
    for flag in ("--help", "--help-all"):
        with pytest.raises(SystemExit) as ended:
            parse([flag])
        assert ended.value.code == 0
        texts[flag] = capsys.readouterr().out
    short, whole = texts["--help"], texts["--help-all"]
    assert len(short.splitlines()) <= 40  # examples and exit codes of the command add up to 12
    for name in ClassifyConfig.model_fields:
        flag = f"  --{name.replace('_', '-')}"
        assert flag in whole
        assert (re.search(rf"^{flag}\b(?!-)", short, re.MULTILINE) is not None) == (name in ESSENTIAL), name
    assert all(f"{group} (" in short and f"\n{group}:" in whole for group in GROUPS)


def test_help_shows_all_flags_where_none_is_marked_essential(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        parse(["--help"], BundleCreateConfig)
    text = capsys.readouterr().out
    assert "--dropout" in text
    assert "--help-all" not in text

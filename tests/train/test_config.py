"""Configuration: files and overrides, what is refused and how it is said."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import yaml

from train.config import claim_run_dir, config_from_dict, parse_pretrain_config, read_run_config, resolved_dict

MINIMAL = ["--name=run", "--data.path=set.beton"]


def config_file(folder, text):
    path = folder / "config.yaml"
    path.write_text(text)
    return f"--config={path}"


def test_overrides_win_over_the_file_and_the_file_over_defaults(tmp_path):
    file = config_file(tmp_path, "name: a\ndata: {path: b}\noptim: {base_lr: 0.5, momentum: 0.8}\n")
    config = parse_pretrain_config([file, "--optim.base_lr=0.7"])
    assert (config.optim.base_lr, config.optim.momentum, config.optim.weight_decay) == (0.7, 0.8, 1e-6)


def test_what_is_written_is_read_back():
    config = parse_pretrain_config([*MINIMAL, "--augment.crop_area=[0.2,0.9]", "--model.encoder.depth=18"])
    assert config_from_dict(yaml.safe_load(yaml.safe_dump(resolved_dict(config)))) == config


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--name=run"], "the following arguments are required: data.path"),
        (
            [*MINIMAL, "--model.method=simclear"],
            "`model.method` must be one of 'simclr', 'supervised', 'distill', got simclear",
        ),
        ([*MINIMAL, "--model.temperature=-1"], "`model.temperature` must be a finite number > 0, got -1.0"),
        ([*MINIMAL, "--model.temperature=warm"], "`model.temperature` must be of type float, got warm"),
        (
            [*MINIMAL, "--augment.crop_area=0.9"],
            r"`augment.crop_area` must be a list of 2 numbers, or null, got 0.9",
        ),
        ([*MINIMAL, "--augment.blur_prob=x"], "`augment.blur_prob` must be of type float, or null, got x"),
        ([*MINIMAL, "--augment.mean=0.5"], r"`augment.mean` must be a list such as \[1, 2\], got 0.5"),
        ([*MINIMAL, "--train.epoch=3"], "there is no option `train.epoch`; did you mean `train.epochs`?"),
        (
            [*MINIMAL, "--train.hang_timeout_s=1e300"],
            "`train.hang_timeout_s` must be from 0 to 1e9, got 1e\\+300; 0: off",
        ),
        ([*MINIMAL, "--train.epochs=0"], "`train.epochs` must be at least 1, got 0"),
        ([*MINIMAL, "--data.global_batch_size=1"], "`data.global_batch_size` must be at least 2, got 1"),
        ([*MINIMAL, "--seed=-1"], "`seed` must be from 0 to"),
        ([*MINIMAL, "--seed=100000000000000000000"], "`seed` must be from 0 to"),
        (["--data.path=x", "--name=a/b"], "`name` must be a plain folder name, got 'a/b'"),
        (["--data.path=x", "--name=.."], "`name` must be a plain folder name, got '..'"),
        ([*MINIMAL, "junk"], "there is no option `junk`"),
    ],
)
def test_a_bad_option_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        parse_pretrain_config(arguments)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: 5\n", "`train` must hold options, got 5"),
        ("model: {encoder: null}\n", "`model.encoder` must hold options, got None"),
        ("trainn: {epochs: 3}\n", "there is no option `trainn.epochs`; did you mean `train.epochs`?"),
        ("data: {pth: x}\n", "there is no option `data.pth`; did you mean `data.path`?"),
        ("- a\n- b\n", "`--config` must name a YAML file of sections and options, got - a - b"),
        ("", "`--config` must name a YAML file of sections and options, got an empty one"),
    ],
)
def test_a_bad_file_is_told_by_what_it_holds(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        parse_pretrain_config([config_file(tmp_path, text), *MINIMAL])


def test_a_binary_file_is_no_configuration(tmp_path):
    (tmp_path / "config.yaml").write_bytes(bytes(range(128, 256)))
    with pytest.raises(ValueError, match="got one that is no text"):
        parse_pretrain_config([f"--config={tmp_path}/config.yaml", *MINIMAL])


def test_a_run_directory_may_be_claimed_again_by_its_own_run_on_another_machine(tmp_path):
    options = [*MINIMAL, f"--runs_dir={tmp_path}"]
    claim_run_dir(parse_pretrain_config(options))
    claim_run_dir(parse_pretrain_config([*options, "--data.num_threads=7", "--data.path=elsewhere.beton"]))
    with pytest.raises(ValueError, match=r"`seed` is 0 in .*/run/config.yaml and 1 in this run"):
        claim_run_dir(parse_pretrain_config([*options, "--seed=1"]))


@pytest.mark.parametrize("text", ["", "- a\n", "a: [\n"])
def test_a_damaged_run_directory_is_named(tmp_path, text):
    config = parse_pretrain_config([*MINIMAL, f"--runs_dir={tmp_path}"])
    claim_run_dir(config)
    (tmp_path / "run" / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"run/config.yaml is damaged; remove"):
        claim_run_dir(config)


def test_a_configuration_of_another_version_is_refused():
    resolved = resolved_dict(parse_pretrain_config(MINIMAL))
    resolved["train"]["epoch_count"] = 3
    with pytest.raises(ValueError, match=r"there is no option `train.epoch_count`"):
        config_from_dict(resolved)


def test_a_folder_without_a_run_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"holds no config.yaml; give the directory of a run"):
        read_run_config(tmp_path)


def test_a_file_in_the_place_of_the_runs_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="`runs_dir` must be a folder, found a file at"):
        claim_run_dir(parse_pretrain_config([*MINIMAL, f"--runs_dir={tmp_path}/file"]))


def test_ranks_of_one_number_on_several_machines_claim_a_directory_at_once(tmp_path):
    """As in containers, where processes are numbered alike."""
    for trial in range(30):
        config = parse_pretrain_config([*MINIMAL, f"--runs_dir={tmp_path}", f"--name=run{trial}"])
        barrier = threading.Barrier(4)

        def claim(config=config, barrier=barrier):
            barrier.wait()
            claim_run_dir(config)

        with ThreadPoolExecutor(4) as pool:
            for claimed in [pool.submit(claim) for _ in range(4)]:
                claimed.result()
        assert [path.name for path in config.run_dir.iterdir()] == ["config.yaml"]

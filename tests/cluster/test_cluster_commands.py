"""``python -m cluster check|launch|sbatch``: their command lines and scripts, and the requests that they refuse."""

from __future__ import annotations

import base64
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from toy_launches import PYTHON, ROOT, execute

from priorclip.cluster.commands import LaunchConfig, SbatchConfig
from priorclip.cluster.launch.command_line import deepspeed_command, quote_for_pdsh
from priorclip.cluster.launch.hostfile import read_hostfile
from priorclip.cluster.launch.sbatch import TEMPLATES, render_script, seconds_of

CPU = {"DS_ACCELERATOR": "cpu"}
RUN = ["pretrain", "--config", "my run.yaml", "--data.shards", "{pub11,rs3}-train-{0000..0031}.tar"]


@pytest.fixture
def hosts(tmp_path: Path) -> str:
    path = tmp_path / "hosts"
    path.write_text("# two machines\nworker-0 slots=8\n\nme@10.0.0.2  slots=4   # the old one\n")
    return str(path)


def test_hostfile_keeps_the_order(hosts: str) -> None:
    assert list(read_hostfile(hosts).items()) == [("worker-0", 8), ("me@10.0.0.2", 4)]


def test_hostfile_of_windows(tmp_path: Path) -> None:
    """A byte order mark and carriage returns are no part of the names; UTF-16 is refused by its name."""
    (tmp_path / "hosts").write_bytes(b"\xef\xbb\xbfnode0 slots=2\r\n\r\nnode1 slots=3\r\n")
    assert read_hostfile(tmp_path / "hosts") == {"node0": 2, "node1": 3}
    (tmp_path / "hosts").write_bytes("node0 slots=2\r\n".encode("utf-16"))
    with pytest.raises(ValueError, match="hosts is no UTF-8 text"):
        read_hostfile(tmp_path / "hosts")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a slots=2\nb slots=two\n", "line 2: 'b slots=two' is not 'HOST slots=N'"),
        ("$(reboot) slots=2\n", "is not 'HOST slots=N'"),
        ("a;reboot slots=2\n", "is not 'HOST slots=N'"),
        ("-oProxyCommand=reboot slots=2\n", "is not 'HOST slots=N'"),
        ("a slots=2\na slots=2\n", "line 2: a is there twice"),
        ("a slots=0\n", "a has no slots"),
        ("# nothing\n", "names no host"),
    ],
)
def test_hostfile_errors_name_the_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "hosts"
    path.write_text(text)
    with pytest.raises(ValueError, match=r".") as raised:
        read_hostfile(path)
    assert message in str(raised.value)
    assert "hosts" in str(raised.value)


def world_of(command: list[str]) -> dict[str, list[int]]:
    (world,) = [word.removeprefix("--world_info=") for word in command if word.startswith("--world_info=")]
    return json.loads(base64.urlsafe_b64decode(world))


def test_local_launch_starts_deepspeeds_launcher_of_this_python() -> None:
    command = deepspeed_command(LaunchConfig(nproc=3, master_port=1234), RUN, CPU)
    assert command[:4] == [sys.executable, "-u", "-m", "deepspeed.launcher.launch"]
    assert world_of(command) == {"node0": [0, 1, 2]}
    assert {"--master_addr=127.0.0.1", "--master_port=1234", "--node_rank=0"} < set(command)
    assert command[command.index("--module") + 1 :] == ["priorclip.pretrain", *RUN[1:]]


def test_local_launch_finds_a_port_and_two_cpu_ranks() -> None:
    command = deepspeed_command(LaunchConfig(), RUN, CPU)
    assert world_of(command) == {"node0": [0, 1]}
    (port,) = [int(word.removeprefix("--master_port=")) for word in command if word.startswith("--master_port=")]
    assert 1024 < port < 65536


def test_local_launch_uses_the_visible_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    visible = {"CUDA_VISIBLE_DEVICES": "5,2,7"}
    assert world_of(deepspeed_command(LaunchConfig(), RUN, visible)) == {"node0": [5, 2, 7]}
    assert world_of(deepspeed_command(LaunchConfig(nproc=2), RUN, visible)) == {"node0": [5, 2]}
    assert world_of(deepspeed_command(LaunchConfig(), RUN, {})) == {"node0": [0, 1, 2]}
    with pytest.raises(ValueError, match="--nproc 4, but there are 3 GPUs"):
        deepspeed_command(LaunchConfig(nproc=4), RUN, visible)


def test_launcher_of_a_node_reads_its_number_from_srun() -> None:
    node = LaunchConfig(launcher="node", nproc=8)
    step = {"SLURM_NODEID": "1", "SLURM_STEP_NUM_NODES": "4", "SLURM_JOB_ID": "45678", "MASTER_ADDR": "10.0.0.2"}
    command = deepspeed_command(node, RUN, {**CPU, **step})
    assert world_of(command) == {f"node{number}": list(range(8)) for number in range(4)}
    assert {"--node_rank=1", "--master_addr=10.0.0.2", "--master_port=25678"} < set(command)
    for missing, message in (("SLURM_NODEID", "--node-rank"), ("MASTER_ADDR", "--master-addr")):
        with pytest.raises(ValueError, match=message):
            deepspeed_command(node, RUN, {**CPU, **{name: step[name] for name in step if name != missing}})


def test_hostfile_launch(hosts: str) -> None:
    command = deepspeed_command(LaunchConfig(hostfile=hosts, ssh_port=2222, master_port=29512), RUN, CPU)
    text = shlex.join(command)
    assert f"--hostfile {hosts} --force_multi --launcher pdsh --ssh_port 2222 --master_port 29512" in text
    assert command[command.index("--module") + 1] == "priorclip.pretrain"


def test_openmpi_launch_adds_arguments_for_mpirun(hosts: str) -> None:
    config = LaunchConfig(hostfile=hosts, launcher="openmpi", ssh_port=2222, master_port=29512, launcher_args="--np 2")
    (given_args,) = [word for word in deepspeed_command(config, RUN, CPU) if word.startswith("--launcher_args=")]
    words = shlex.split(given_args.removeprefix("--launcher_args="))
    assert words[:2] == ["--np", "2"]
    assert words[words.index("plm_rsh_args") + 1] == "-p 2222"
    assert words[words.index("-x") + 1] == "MASTER_PORT=29512"
    assert "btl_tcp_if_include" in words


def test_slurm_launch_runs_the_module(hosts: str, tmp_path: Path) -> None:
    command = deepspeed_command(LaunchConfig(hostfile=hosts, launcher="slurm"), RUN, CPU)
    script = ROOT / "priorclip" / "cluster" / "launch" / "run_module.py"
    assert command[command.index(str(script)) + 1 :] == ["priorclip.pretrain", *RUN[1:]]
    (tmp_path / "shown.py").write_text("import sys; print(sys.path[0], sys.argv[1:], __name__)")
    ran = execute([PYTHON, str(script), "shown", *RUN[1:]], cwd=tmp_path)
    assert ran.stdout.strip() == f"{tmp_path} {RUN[1:]} __main__"


def test_launcher_that_is_killed_fails_the_launch(tmp_path: Path) -> None:
    """DeepSpeed's own runner exits with 0 then, as if the run had finished."""
    hosts = tmp_path / "hosts"
    hosts.write_text("node0 slots=1\nnode1 slots=1\n")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "srun").write_text("#!/bin/sh\nkill -9 $$\n")
    (tmp_path / "bin" / "srun").chmod(0o755)
    command = [PYTHON, "-m", "cluster", "launch", "--hostfile", str(hosts), "--launcher", "slurm", "--", *RUN]
    done = execute(command, {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"})
    assert done.returncode == 128 + 9, done.stdout
    assert "srun (process" in done.stdout
    assert "was ended by SIGKILL" in done.stdout


@pytest.mark.parametrize(
    ("config", "run", "message"),
    [
        (LaunchConfig(), ["pretrain;reboot"], "'pretrain;reboot' is no module"),
        (LaunchConfig(), ["nosuchmodule"], "'nosuchmodule' is no module of"),
        (LaunchConfig(nproc=0), RUN, "--nproc 0: at least one rank"),
        (LaunchConfig(launcher="pdsh"), RUN, "--launcher pdsh needs --hostfile"),
        (LaunchConfig(hostfile="missing"), RUN, "hostfile missing cannot be read: No such file"),
    ],
)
def test_launch_refuses(config: LaunchConfig, run: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=r".") as raised:
        deepspeed_command(config, run, CPU)
    assert message in str(raised.value)


def test_nproc_is_not_for_hostfiles(hosts: str) -> None:
    with pytest.raises(ValueError, match="--nproc is for this machine alone"):
        deepspeed_command(LaunchConfig(hostfile=hosts, nproc=2), RUN, CPU)


WORDS = st.text(st.characters(exclude_characters="\0\r", exclude_categories=["Cs"]), min_size=1, max_size=30)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(words=st.lists(WORDS, min_size=1, max_size=6))
def test_words_arrive_whole_over_pdsh(words: list[str]) -> None:
    """The words pass through the quoting of DeepSpeed's pdsh runner, the % of pdsh, and a real shell."""
    quoted = [quote_for_pdsh(word) for word in words]
    deepspeed = ['"{}"'.format(word.replace('"', '\\"')) if " " in word else word for word in quoted]
    line = " ".join(deepspeed).replace("%%", "%")
    shown = subprocess.run(["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, check=True).stdout
    assert shown.decode().split("\0")[:-1] == words


def test_batch_script_of_a_gpu_cluster() -> None:
    script = render_script(
        SbatchConfig(nodes=4, gpus_per_node=8, partition="gpu", account="rs", time="2-00:00:00"), RUN
    )
    for line in ("--nodes=4", "--ntasks-per-node=8", "--gpus-per-node=8", "--partition=gpu", "--account=rs",
                 "--time=2-00:00:00", "--requeue", "--signal=USR1@300"):  # fmt: skip
        assert f"#SBATCH {line}\n" in script
    assert "--qos" not in script
    assert "container" not in script.partition("srun --")[2]
    assert f"{sys.executable} -u -m priorclip.pretrain --config 'my run.yaml'" in script
    assert '[ "$code" = 75 ]' in script
    assert "{{" not in script.replace("{{names}}", "")
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_batch_script_of_a_cpu_cluster() -> None:
    script = render_script(SbatchConfig(gpus_per_node=0, ranks_per_node=4), RUN)
    assert "#SBATCH --ntasks-per-node=4\n" in script
    assert "--gpus-per-node" not in script


def test_batch_script_with_a_container() -> None:
    apptainer = render_script(SbatchConfig(container="my images/rs.sif"), RUN)
    assert (
        f"apptainer exec --nv --bind {Path.cwd()} --pwd {Path.cwd()} 'my images/rs.sif' \\\n    python3 -u" in apptainer
    )
    pyxis = render_script(SbatchConfig(container="nvcr.io#rs:1", container_runtime="pyxis"), RUN)
    assert "'--container-image=nvcr.io#rs:1'" in pyxis
    assert "apptainer" not in pyxis
    subprocess.run(["bash", "-n"], input=apptainer + pyxis, text=True, check=True)


@settings(max_examples=50, deadline=None)
@given(words=st.lists(WORDS, max_size=5))
def test_batch_script_keeps_the_words(words: list[str]) -> None:
    """A real bash runs the script, with an srun that prints its words."""
    script = render_script(SbatchConfig(), ["pretrain", *words])
    printing = 'srun() { printf "%s\\0" "$@"; }\n' + script
    shown = subprocess.run(["bash", "-c", printing], capture_output=True, check=True).stdout.decode().split("\0")[:-1]
    assert shown[shown.index("-m") + 1 :] == ["priorclip.pretrain", *words]


@pytest.mark.parametrize(
    ("limit", "seconds"),
    [("10", 600), ("1:30", 90), ("2:00:05", 7205), ("1-2", 93600), ("1-2:03", 93780), ("1-2:03:04", 93784), ("0", 0)],
)
def test_time_limits_have_the_meaning_of_slurm(limit: str, seconds: int) -> None:
    assert seconds_of(limit) == seconds


@pytest.mark.parametrize("launcher", ["srun", "node"])
@pytest.mark.parametrize(("code", "retries", "requeued"), [(0, 2, 0), (75, 0, 4), (3, 0, 0), (137, 2, 2)])
def test_job_is_requeued(code: int, retries: int, requeued: int, launcher: str, tmp_path: Path) -> None:
    """Four runs of the job: requeued after each stop at a checkpoint, and after a failure ``retries`` times."""
    script = render_script(SbatchConfig(launcher=launcher, retries=retries, logs=str(tmp_path)), RUN)
    programs = f'srun() {{ return {code}; }}\nscontrol() {{ [ "$1" = requeue ] && echo "requeued $2"; }}\n'
    variables = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "x"}
    done = [execute(["bash", "-c", programs + script], variables) for _ in range(4)]
    assert [each.returncode for each in done] == [code] * 4
    assert ["requeued 7" in each.stdout for each in done] == [True] * requeued + [False] * (4 - requeued)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (SbatchConfig(job_name="x\n#SBATCH --wrap=reboot"), "--job-name 'x\n#SBATCH"),
        (SbatchConfig(partition="gpu; reboot"), "--partition 'gpu; reboot' has characters"),
        (SbatchConfig(account="$(reboot)"), "--account"),
        (SbatchConfig(time="tomorrow"), "--time 'tomorrow'"),
        (SbatchConfig(time="5"), "--time 5 is no more than --signal-seconds 300"),
        (SbatchConfig(time="0-1", signal_seconds=3600), "the run would get the signal to end when it starts"),
        (SbatchConfig(logs="my logs"), "--logs"),
        (SbatchConfig(nodes=0), "--nodes is 0: at least 1"),
        (SbatchConfig(template="missing.sbatch"), "--template missing.sbatch cannot be read"),
    ],
)
def test_sbatch_refuses(config: SbatchConfig, message: str) -> None:
    with pytest.raises(ValueError, match=r".") as raised:
        render_script(config, RUN)
    assert message in str(raised.value)


def test_template_of_a_user(tmp_path: Path) -> None:
    path = tmp_path / "own.sbatch"
    path.write_text(
        TEMPLATES["srun"].read_text().replace("#SBATCH --requeue", "#SBATCH --requeue\n#SBATCH --constraint=a100")
    )
    assert "#SBATCH --constraint=a100\n" in render_script(SbatchConfig(template=str(path)), RUN)
    for content, message in (
        (b"#!/bin/bash\nsrun {{command}} {{comand}}\n", r"own.sbatch, line 2: \{\{comand\}\} is not one of .*command"),
        (b"#!/bin/bash\nsrun hostname\n", r"own.sbatch does not start the run: put \{\{command\}\} where it belongs"),
        (b"node0 slots=8\n", "own.sbatch is no batch script"),
        (b"", "own.sbatch is no batch script"),
        (b"#!/bin/bash\n\xff", "own.sbatch is no text in UTF-8"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            render_script(SbatchConfig(template=str(path)), RUN)


def test_missing_run_is_an_error() -> None:
    done = execute([PYTHON, "-m", "cluster", "launch", "--nproc", "2"])
    assert done.returncode == 2
    assert "python -m cluster launch --nproc 2 -- pretrain --config FILE.yaml" in done.stdout


def test_dry_run_prints_the_command() -> None:
    done = execute(
        [PYTHON, "-m", "cluster", "launch", "--nproc", "2", "--master-port", "5000", "--dry-run", "--", *RUN]
    )
    assert done.returncode == 0
    printed = shlex.split(done.stdout)
    assert printed[printed.index("--module") + 1 :] == ["priorclip.pretrain", *RUN[1:]]

"""A bug in the engine leaves a script of a few events, which fails when it is run alone, and only with it."""

import os
import re
import subprocess
from pathlib import Path

import planted

NAME = "an_evicted_page_can_still_be_found"
MOST_EVENTS = 8


def run(simulator: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [str(simulator), "--gtest_brief=1", "--gtest_filter=SchedulerSim.*"]
    env = {**os.environ, **environment}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=env)


def test_a_planted_bug_is_cut_down_to_a_short_script(tmp_path: Path) -> None:
    simulator = planted.simulator(planted.PATCHES / f"{NAME}.patch", tmp_path)
    found = run(simulator)
    assert found.returncode != 0
    assert re.search(r"world \d+ fails \(TS_SIM_SEED=\d+ begins with it\)", found.stdout), found.stdout
    num_events = re.search(r"these (\d+) of its \d+ events fail too", found.stdout)
    assert num_events is not None, found.stdout
    assert int(num_events[1]) <= MOST_EVENTS, found.stdout

    script = tmp_path / "script"
    script.write_text("".join(re.findall(r"^(?:world page_size|\d+ [a-z]+).*\n", found.stdout, re.MULTILINE)))
    assert len(script.read_text().splitlines()) == int(num_events[1]) + 1
    assert run(simulator, TS_SIM_SCRIPT=str(script)).returncode != 0, "the script alone finds the bug"
    sound = planted.BUILD / "tests" / "sim_tests"
    assert run(sound, TS_SIM_SCRIPT=str(script)).returncode == 0, "without the bug nothing is wrong with it"

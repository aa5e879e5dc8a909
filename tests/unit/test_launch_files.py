"""Everything in launch/ would work where it is for: recipes, units, manifests, the dashboard. Starts nothing."""

import importlib.util
import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from sglmoe import recipe
from sglmoe.launch_server import read_options

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
RECIPES = sorted(LAUNCH.glob("*/*.toml"))
GPUS = ("16gb", "24gb", "48gb", "80gb", "141gb")


def test_there_is_a_recipe_for_every_machine_and_model() -> None:
    models = [path.stem for path in (LAUNCH / "models").glob("*.json")]
    expected = {f"{machine}/{model}" for machine in (*GPUS, "cpu") for model in models}
    assert {f"{path.parent.name}/{path.stem}" for path in RECIPES} == expected
    assert len(models) == 6


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_recipe_passes_its_dry_run(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its budget works on the machine it is for, whatever this one is, and it says that nobody has run it."""
    assert recipe.main([str(path), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"(no GPU|nobody) has run this recipe", printed)
    assert "python -m sglmoe.launch_server --model-path" in printed
    assert "this machine: " in printed


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_recipe_is_for_the_machine_and_model_of_its_name_and_can_be_run(path: Path) -> None:
    its, machine = recipe.read_recipe(path)
    assert its.machine == path.parent.name
    assert Path(its.shape).stem == path.stem
    assert machine.machine().has_gpu == (path.parent.name in GPUS)
    assert path.read_text().startswith("#!/usr/bin/env -S python -m sglmoe.recipe\n")
    assert os.access(path, os.X_OK)
    plan, _ = recipe.read_plan(path, [])
    assert read_options(list(plan.command[3:])).memory_budget is not None
    if machine.machine().has_gpu:
        assert plan.chosen.budget_bytes < machine.machine().device_bytes


def test_a_recipe_hands_more_flags_on() -> None:
    plan, _ = recipe.read_plan(RECIPES[0], ["--port", "1"])
    assert plan.command[-2:] == ("--port", "1")


def test_a_recipe_counts_flags_that_take_of_the_budget() -> None:
    path = LAUNCH / "24gb" / "qwen3-30b-a3b.toml"
    more = ["--cuda-graph-backend-decode=breakable", "--max-running-requests=4"]
    plan, _ = recipe.read_plan(path, more)
    assert plan.graphs.max_rows == 4
    assert plan.command[-2:] == tuple(more)


def test_a_recipe_is_of_its_dtype() -> None:
    """Twice the bytes a number: half of the frames, for experts and KV that are twice as large."""
    path = LAUNCH / "80gb" / "qwen3-30b-a3b.toml"
    ours, larger = (recipe.read_plan(path, more)[0] for more in ([], ["--dtype=float32"]))
    assert larger.shape.expert_bytes == 2 * ours.shape.expert_bytes
    assert larger.shape.token_bytes == 2 * ours.shape.token_bytes
    assert larger.chosen.geometry is not None
    assert ours.chosen.geometry is not None
    assert larger.chosen.geometry.num_frames < 0.5 * ours.chosen.geometry.num_frames
    assert larger.chosen.geometry.frame_bytes == 2 * ours.chosen.geometry.frame_bytes
    with pytest.raises(ValueError, match="--dtype"):
        recipe.read_plan(path, ["--dtype=floa"])


def test_a_recipe_counts_packed_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(recipe, "stored_bytes_of", lambda *its: asked.append(its[1:]) or 2**20)
    plan, _ = recipe.read_plan(LAUNCH / "24gb" / "olmoe-1b-7b.toml", ["--packed-experts=./there"])
    assert plan.decoding_bytes == 9 * 2**20
    assert asked == [("./there", "cuda")]


def write_recipe(folder: Path, **changes: str) -> Path:
    fields = {
        "model": "nobody/small",
        "shape": str(LAUNCH / "models" / "olmoe-1b-7b.json"),
        "machine": "small",
    }
    (folder / "small").mkdir()
    (folder / "machines.toml").write_text(
        '[small]\nname = "small"\ndevice = "cpu"\nhost_memory = "3GiB"\n'
        'device_bandwidth = "1GB/s"\nlink = "1GB/s"\n'
    )
    path = folder / "small" / "small.toml"
    path.write_text("".join(f'{name} = "{text}"\n' for name, text in (fields | changes).items()))
    return path


def test_a_recipe_too_large_for_its_machine_fails_its_dry_run(tmp_path: Path) -> None:
    """Half of 3 GiB holds OLMoE's dense weights and some experts; with 2 GiB for the server it is too much."""
    assert recipe.main([str(write_recipe(tmp_path)), "--dry-run"]) == 1


@pytest.mark.parametrize("changes", [{"machine": "none"}, {"typo": "1"}, {"shape": "none.json"}])
def test_a_recipe_that_is_none_says_so(tmp_path: Path, changes: dict[str, str]) -> None:
    with pytest.raises(SystemExit, match=r"small\.toml: "):
        recipe.main([str(write_recipe(tmp_path, **changes)), "--dry-run"])


def test_a_server_is_not_started_where_it_can_not_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A GPU's recipe on a machine without one."""
    monkeypatch.setattr(recipe, "has_accelerator", lambda: False)
    monkeypatch.setattr(os, "execv", lambda *_: pytest.fail("it started"))
    with pytest.raises(SystemExit, match="not started"):
        recipe.main([str(LAUNCH / "24gb" / "olmoe-1b-7b.toml")])
    assert "problem: there is no GPU" in capsys.readouterr().out


def test_a_server_takes_the_recipes_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_recipe(tmp_path)
    machines = path.parent.parent / "machines.toml"
    machines.write_text(machines.read_text().replace("3GiB", "12GiB"))
    became: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda _, command: became.append(command))
    monkeypatch.setattr(recipe, "check_here", lambda *_: ["note: all is well"])
    recipe.main([str(path), "--port", "1"])
    assert became[0][1:5] == ["-m", "sglmoe.launch_server", "--model-path", "nobody/small"]
    assert became[0][-2:] == ["--port", "1"]


# ------------------------------------------------------------------------------------------ deployments


def manifests() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((LAUNCH / "kubernetes" / "sglmoe.yaml").read_text()))


def test_the_kubernetes_deployment_probes_and_starts_a_recipe_that_exists() -> None:
    deployment = next(
        it
        for it in manifests()
        if it["kind"] == "Deployment" and it["metadata"]["name"] == "sglmoe"
    )
    spec = deployment["spec"]["template"]["spec"]
    (server,) = spec["containers"]
    assert (ROOT / server["args"][0]) in RECIPES
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert server[probe]["httpGet"] == {"path": "/health", "port": "http"}
        assert server[probe]["timeoutSeconds"] > 20  # SGLang answers 503 after so long
    assert spec["terminationGracePeriodSeconds"] > 60  # --shutdown-timeout


def test_selectors_and_services_find_the_pods() -> None:
    by_kind = {(it["kind"], it["metadata"]["name"]): it for it in manifests()}
    for (kind, name), its in by_kind.items():
        if kind == "Deployment":
            labels = its["spec"]["template"]["metadata"]["labels"]
            assert its["spec"]["selector"]["matchLabels"] == labels == {"app": name}
    assert by_kind["Service", "sglmoe-router"]["spec"]["selector"] == {"app": "sglmoe-router"}
    router = by_kind["Deployment", "sglmoe-router"]["spec"]["template"]["spec"]["containers"][0]
    assert "--selector app=sglmoe " in router["args"][0]


def test_the_unit_turns_its_instance_into_a_recipe() -> None:
    unit = (LAUNCH / "systemd" / "sglmoe@.service").read_text()
    (line,) = re.findall(r"^ExecStart=/bin/sh -c '(.*)'$", unit, re.MULTILINE)
    for path in RECIPES:
        script = line.replace("%i", f"{path.parent.name}-{path.stem}")
        script = script.replace("%%", "%").replace("$$", "$").replace("exec python", "echo")
        run = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True)
        assert run.stdout.split()[2] == f"launch/{path.parent.name}/{path.name}"
    assert "LimitMEMLOCK=infinity" in unit


def test_the_image_is_made_of_files_that_exist_and_runs_recipes() -> None:
    text = (LAUNCH / "docker" / "Dockerfile").read_text()
    for line in re.findall(r"^COPY (.*) \S+$", text, re.MULTILINE):
        assert all((ROOT / name).exists() for name in line.split())
    assert 'ENTRYPOINT ["python", "-m", "sglmoe.recipe"]' in text
    for name in re.findall(r"launch/\S+\.toml", text):
        assert ROOT / name in RECIPES


def test_replicas_are_started_by_a_script_that_parses() -> None:
    script = LAUNCH / "replicas.sh"
    subprocess.run(["bash", "-n", script], check=True)
    assert os.access(script, os.X_OK)


def test_prometheus_reads_where_the_server_exports() -> None:
    config = yaml.safe_load((LAUNCH / "monitoring" / "prometheus.yml").read_text())
    assert config["scrape_configs"][0]["static_configs"] == [{"targets": ["localhost:30000"]}]


# -------------------------------------------------------------------------------------------- dashboard


def exported() -> set[str]:
    """What the code names, as Prometheus sees it: counters end in _total, histograms have buckets."""
    ours = (ROOT / "sglmoe" / "scheduler" / "frontend_own_metrics.py").read_text()
    counters, gauges = ours.split("COUNTERS = {")[1].split("\n}\n")[0], ours
    names = {f"{name}_total" for name in re.findall(r'"(sglmoe_\w+)": \(', counters)}
    names |= {f"{name}_total" for name in re.findall(r'counter\(\s*"(sglmoe_\w+)"', ours)}
    gauges = gauges.replace(counters, "")
    names |= set(re.findall(r'"(sglmoe_\w+)": \(', gauges))
    names |= set(re.findall(r'gauge\(\s*"(sglmoe_\w+)"', gauges))
    spec = importlib.util.find_spec("sglang")
    assert spec is not None
    assert spec.origin is not None
    collector = Path(spec.origin).parent / "srt" / "observability" / "metrics_collector.py"
    theirs = re.findall(r'(\w+)\(\s*name="(sglang:\w+)"', collector.read_text())
    return names | {f"{name}_bucket" if kind == "Histogram" else name for kind, name in theirs}


def test_every_metric_of_the_dashboard_is_exported() -> None:
    dashboard = json.loads((LAUNCH / "monitoring" / "grafana.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    queries += [its["query"] for its in dashboard["templating"]["list"]]
    used = {name for query in queries for name in re.findall(r"(?:sglmoe_|sglang:)\w+", query)}
    assert len(used) > 30
    assert used - exported() == set()


def test_panels_do_not_overlap() -> None:
    dashboard = json.loads((LAUNCH / "monitoring" / "grafana.json").read_text())
    places = [(p["gridPos"]["x"], p["gridPos"]["y"]) for p in dashboard["panels"]]
    assert len(set(places)) == len(places)
    assert len({p["id"] for p in dashboard["panels"]}) == len(places)


def test_a_recipe_too_large_for_its_machine_does_not_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However large this one is."""
    monkeypatch.setattr(os, "execv", lambda *_: pytest.fail("it started"))
    monkeypatch.setattr(recipe, "check_here", lambda *_: ["note: all is well"])
    with pytest.raises(SystemExit, match="not started"):
        recipe.main([str(write_recipe(tmp_path))])

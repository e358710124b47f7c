"""tools/carry.py: a folder of packages with which the scripts run where the project is not."""

import base64
import csv
import hashlib
import io
import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from zipfile import ZipFile

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from llama_lora.cli import InputError
from tests.conftest import ROOT, error_line, run_script

PINS = dict(
    line.split("==") for line in (ROOT / "requirements.txt").read_text().split() if "==" in line
)
CUDA = "118", "121", "124", "126", "128", "130", "132"
LIBRARIES = [
    f"bitsandbytes/libbitsandbytes_{kind}.so"
    for kind in ("cpu", *(f"cuda{version}" for version in CUDA), "rocm72", "xpu2026")
]


@pytest.fixture(scope="module")
def tools():
    """Import modules of tools/, which is not installed."""
    sys.path.insert(0, str(ROOT / "tools"))
    yield import_module
    sys.path.remove(str(ROOT / "tools"))


def make_wheel(folder: Path, name: str, version: str, files=(), requires=()) -> Path:
    """A small wheel that pip takes, with an empty module besides the files."""
    wheel = folder / f"{name}-{version}-py3-none-any.whl"
    info = f"{name}-{version}.dist-info"
    head = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    contents = {f"{name}/__init__.py": "", **{path: path for path in files}}
    contents[f"{info}/METADATA"] = head + "".join(f"Requires-Dist: {one}\n" for one in requires)
    contents[f"{info}/WHEEL"] = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    rows = [[path, digest(text.encode()), len(text)] for path, text in contents.items()]
    record = io.StringIO()
    csv.writer(record, lineterminator="\n").writerows([*rows, [f"{info}/RECORD", "", ""]])
    with ZipFile(wheel, "w") as archive:
        for path, text in {**contents, f"{info}/RECORD": record.getvalue()}.items():
            archive.writestr(path, text)
    return wheel


def digest(content: bytes) -> str:
    sha256 = hashlib.sha256(content).digest()
    return "sha256=" + base64.urlsafe_b64encode(sha256).rstrip(b"=").decode()


def install(wheels: list[Path], site: Path, python=sys.executable) -> None:
    """As the folder's README.txt says."""
    flags = ["--no-index", "--no-deps", "--no-compile", "--no-cache-dir", "--upgrade"]
    command = [python, "-m", "pip", "install", *flags, "--target", site, *wheels]
    subprocess.run(command, check=True, capture_output=True)


# ---- A smaller wheel ----


@pytest.fixture
def bitsandbytes_wheel(tmp_path):
    return make_wheel(tmp_path, "bitsandbytes", "0.50.2", LIBRARIES)


def libraries(site: Path) -> set[str]:
    return {path.stem.split("_")[1] for path in site.glob("bitsandbytes/*.so")}


def test_a_wheel_without_some_files_is_a_wheel(tools, bitsandbytes_wheel, tmp_path):
    wheels = tools("wheels")
    surplus = wheels.surplus_libraries(bitsandbytes_wheel, ["12.6", "13.0"])
    wheels.drop(bitsandbytes_wheel, surplus)
    with ZipFile(bitsandbytes_wheel) as archive:
        record = archive.read("bitsandbytes-0.50.2.dist-info/RECORD").decode()
        rows = {path: (found, size) for path, found, size in csv.reader(record.splitlines())}
        assert set(rows) == set(archive.namelist())
        for path, (found, size) in rows.items():
            if not path.endswith("RECORD"):
                content = archive.read(path)
                assert (found, size) == (digest(content), str(len(content)))
    install([bitsandbytes_wheel], tmp_path / "site")
    assert libraries(tmp_path / "site") == {"cpu", "cuda126", "cuda130"}


@pytest.mark.parametrize("cuda", ["11.0", "12.0", "12.6", "12.9", "13.0", "13.1", "13.5"])
def test_the_library_that_bitsandbytes_loads_is_kept(
    tools, bitsandbytes_wheel, tmp_path, monkeypatch, cuda
):
    from bitsandbytes import cextension
    from bitsandbytes.cuda_specs import CUDASpecs

    def loaded(site: Path) -> str:
        monkeypatch.setattr(cextension, "PACKAGE_DIR", site / "bitsandbytes")
        version = tuple(map(int, cuda.split(".")))
        path = cextension.get_cuda_bnb_library_path(CUDASpecs((9, 0), "", version))
        assert path.is_file()
        return path.name

    def unpacked(name: str) -> Path:
        with ZipFile(bitsandbytes_wheel) as archive:
            archive.extractall(tmp_path / name)
        return tmp_path / name

    whole = loaded(unpacked("whole"))
    wheels = tools("wheels")
    wheels.drop(bitsandbytes_wheel, wheels.surplus_libraries(bitsandbytes_wheel, [cuda]))
    slim = unpacked("slim")
    assert loaded(slim) == whole
    assert len(libraries(slim)) == 2


def test_a_version_of_cuda_without_a_library(tools, bitsandbytes_wheel):
    with pytest.raises(InputError, match=r"--cuda 14\.0: .* but for 11\.8, 12\.1, .* 13\.2"):
        tools("wheels").surplus_libraries(bitsandbytes_wheel, ["12.6", "14.0"])


# ---- What is missing ----


def test_what_is_missing(tools, tmp_path):
    requires = [
        "old>=2",
        "new>=2",
        "some",
        "fixed==1.1",
        "narrow<3,>=1",
        'before; python_version < "3.12"',
        'since; python_version >= "3.12"',
        'other; sys_platform == "win32"',
        'more; extra == "all"',
    ]
    first = make_wheel(tmp_path, "first", "1.0", requires=requires)
    second = make_wheel(tmp_path, "second", "1.0", requires=["first", "narrow>=2"])
    present = [Requirement(text) for text in ("old==1.9", "New==2.0+local", "some", "fixed")]
    wanted = [Requirement("first==1.0")]
    find = tools("wheels").unmet
    assert find(wanted, present, [], "3.12") == {"first": "==1.0"}
    found = find(wanted, present, [first, second], "3.12")
    assert found == {"old": ">=2", "fixed": "==1.1", "narrow": "<3,>=1,>=2", "since": ""}
    assert "before" in find(wanted, present, [first], "3.11")
    narrow = make_wheel(tmp_path, "narrow", "1.5")
    assert "narrow" in find(wanted, present, [first, second, narrow], "3.12")
    assert "narrow" not in find(wanted, present, [first, narrow], "3.12")


def test_lists_of_packages(tools, tmp_path):
    read = tools("wheels").read_requirements
    listed = tmp_path / "listed.txt"
    listed.write_text(
        "# of a machine\n-e git+ssh://host/name#egg=name\nTorch==2.11.0+cu130  # a build\n"
        'numpy==2.5.2; python_version >= "3.12"\nown @ file:///wheels/own.whl\n\n'
    )
    assert [one.name for one in read(listed, "3.11")] == ["Torch", "own"]
    numpy = read(listed, "3.12")[1]
    assert numpy.specifier.contains(Version("2.5.2"))
    listed.write_text("torch==2.11.0\ntorch 2.11.0\n")
    with pytest.raises(InputError, match="line 2: expected NAME or NAME==VERSION, found 'torch 2"):
        read(listed, "3.12")
    with pytest.raises(InputError, match=r"gone\.txt: cannot be read"):
        read(tmp_path / "gone.txt", "3.12")


# ---- The folder ----

MISSING = "bitsandbytes", "datasets", "deepspeed"


def carry(folder: Path, index: Path, *flags):
    """Run the script where pip finds the wheels of a folder alone, for a machine without three."""
    alone = {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(index)}
    present = folder / "present.txt"
    there = [f"{name}=={version}" for name, version in PINS.items() if name not in MISSING]
    present.write_text("\n".join(there))
    files = "--out", folder / "out", "--present", present
    return run_script("tools/carry.py", *files, *flags, env={**os.environ, **alone})


@pytest.fixture
def index(tmp_path):
    """Wheels of what is missing there; one of them requires two packages, of which one is there."""
    folder = tmp_path / "index"
    folder.mkdir()
    make_wheel(folder, "bitsandbytes", PINS["bitsandbytes"], LIBRARIES)
    make_wheel(folder, "datasets", PINS["datasets"], requires=["dill<0.5", "torch>=2"])
    make_wheel(folder, "deepspeed", PINS["deepspeed"])
    for version in ("0.4", "0.6"):
        make_wheel(folder, "dill", version)
    return folder


def test_a_folder_appears_whole_and_replaces_the_one_before(tmp_path, index):
    done = carry(tmp_path, index, "--cuda", "13.0")
    assert done.returncode == 0, done.stderr
    out = tmp_path / "out"
    carried = {f"{name}-{PINS[name]}-py3-none-any.whl" for name in MISSING}
    carried |= {"dill-0.4-py3-none-any.whl", "README.txt"}
    assert {path.name for path in out.iterdir()} == carried
    assert "python3 -m pip install --no-index" in (out / "README.txt").read_text()
    for name in (*MISSING, "dill"):
        assert f"MiB  {name} " in done.stdout
    with ZipFile(*out.glob("bitsandbytes-*")) as archive:
        archive.extractall(tmp_path / "site")
    assert libraries(tmp_path / "site") == {"cpu", "cuda130"}

    (out / "old-1.0-py3-none-any.whl").touch()
    (index / f"deepspeed-{PINS['deepspeed']}-py3-none-any.whl").unlink()
    assert f"deepspeed=={PINS['deepspeed']}: pip: " in error_line(carry(tmp_path, index))
    assert {path.name for path in out.iterdir()} == {*carried, "old-1.0-py3-none-any.whl"}
    make_wheel(index, "deepspeed", PINS["deepspeed"])
    assert carry(tmp_path, index).returncode == 0
    assert {path.name for path in out.iterdir()} == carried
    assert not list(tmp_path.glob(".carried-*"))


def test_a_folder_that_is_too_large(tmp_path, tools):
    for name, size in (("small", 2**20), ("large", 3 * 2**20)):
        (tmp_path / f"{name}-1.0-py3-none-any.whl").write_bytes(bytes(size))
    check = tools("carry").check_size
    assert check(tmp_path, 4) == 4
    said = r"4\.0 MiB of packages, more than --mib 3\.5: large 1\.0 3\.0, small 1\.0 1\.0"
    with pytest.raises(InputError, match=said):
        check(tmp_path, 3.5)


def test_other_folders_are_not_replaced(tmp_path):
    out = tmp_path / "out"
    out.touch()
    assert f"error: {out}: " in error_line(carry(tmp_path, tmp_path))
    out.unlink()
    out.mkdir()
    (out / "README.md").touch()
    assert f"error: {out}: expected nothing there" in error_line(carry(tmp_path, tmp_path))
    assert [path.name for path in out.iterdir()] == ["README.md"]


# ---- There ----


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    """Run Python with what a card's machine has, the carried packages, and this folder."""
    target, carried = ROOT / ".demo/target", ROOT / ".demo/carried"
    for path in (target / "complete", carried / "README.txt"):
        assert path.is_file(), f"{path} is missing: run `make test-slow`"
    python, site = target / "bin/python3", tmp_path_factory.mktemp("carried") / "site"
    install(list(carried.glob("*.whl")), site, python)

    def run(*words, paths=(site, ROOT)) -> subprocess.CompletedProcess:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}
        command = [python, *map(str, words)]
        return subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
        )

    return run


VERSIONS = """
import json, sys
from importlib.metadata import PackageNotFoundError, version
def found(name):
    try: return version(name)
    except PackageNotFoundError: return None
print(json.dumps({name: found(name) for name in sys.argv[1:]}))
"""


@pytest.mark.slow
def test_a_machine_trains_merges_and_answers_with_the_carried_packages(
    machine, tools, tiny_base, tmp_path
):
    carried = tools("carry").CARRIED
    alone = json.loads(machine("-c", VERSIONS, *carried, "pydantic", paths=()).stdout)
    assert not [name for name in carried if alone[name] == PINS[name]]
    assert alone["pydantic"] is None
    assert json.loads(machine("-c", VERSIONS, *carried).stdout) == {
        name: PINS[name] for name in carried
    }
    checked = machine("-m", "pip", "check")
    assert checked.returncode == 0, checked.stdout

    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    questions, answers = tmp_path / "questions.jsonl", tmp_path / "answers.json"
    questions.write_text(json.dumps({"prompt": "Who are you?"}) + "\n")
    base = "--base_model", tiny_base
    for command in (
        ["-c", "import deepspeed"],
        [
            *("fastchat/train/train_lora.py", "--model_name_or_path", tiny_base),
            *("--data_path", "data/dummy_en.json", "--output_dir", adapter),
            *("--model_max_length", 512, "--per_device_train_batch_size", 1, "--max_steps", 3),
            *("--quantization", "8bit", "--gradient_checkpointing", True),
        ],
        [
            *("fastchat/model/merge_lora.py", *base, "--lora_weights", adapter),
            *("--output_dir", merged, "--gguf", "Q8_0"),
        ],
        [
            *("generate.py", *base, "--lora_weights", adapter, "--load_4bit"),
            *("--prompt", "Who are you?", "--max_new_tokens", 8),
        ],
        [
            *("generate.py", "--base_model", merged, "--max_new_tokens", 8),
            *("--prompts_file", questions, "--output_file", answers),
        ],
    ):
        done = machine(*command)
        assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((adapter / "summary.json").read_text())["steps"] == 3
    assert len(list(merged.glob("*.gguf"))) == 1
    assert [turn["from"] for turn in json.loads(answers.read_text())[0]["conversations"]] == [
        "human",
        "gpt",
    ]


@pytest.mark.slow
def test_the_benchmark_of_cards_measures_every_row_there(machine, tmp_path):
    def run(*flags):
        own = ["--shape", "tiny", "--steps", 1, "--cache", tmp_path / "cache", "--minutes", 9]
        done = machine("benchmarks/gpu_16gb.py", *own, "--out", tmp_path / "out", *flags)
        assert done.returncode == 0, done.stderr
        (path,) = (tmp_path / "out").glob("*.json")
        return json.loads(path.read_text()), (tmp_path / "out/gpu.md").read_text(), done.stdout

    first, page, told = run("--only", "ours int8 512 × 14")
    assert "only try out the code" in " ".join(page.split())
    assert len(first["rows"]) == 3
    assert "all 3 are measured" in told
    whole, page, told = run("--resume")
    wrong = {name: row for name, row in whole["rows"].items() if row["status"] != "measured"}
    wrong |= {what: found for what, found in whole["checks"].items() if "right" not in found}
    assert wrong == {}
    assert len(whole["checks"]) == 10
    assert {name: whole["rows"][name] for name in first["rows"]} == first["rows"]
    assert "remain" not in told
    assert "not measured yet" not in page.partition("### Training")[2]

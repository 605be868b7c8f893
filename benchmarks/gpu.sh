#!/usr/bin/env bash
# Everything that needs a GPU: its tests, then its benchmarks, in parts of at most ten minutes, thirty in all.
#
#   benchmarks/gpu.sh PART...     one or more of the parts below, or `all`
#   benchmarks/gpu.sh --dry-run PART...     the commands alone
#   benchmarks/gpu.sh --list
#
# A JSON file and a log of each part are written to $OUT, by default benchmarks/results. A table is printed last; it
# lists steps that failed or ran out of time. The others still run, and the exit code is 1 then.
#
# It needs Python 3.11 or newer with torch, triton, transformers, safetensors, einops, pluggy, numpy, pillow, pytest and
# hypothesis, and no network. Our packages are imported from packages/*/src; only the wheels in the folder $WHEELS
# (.whl) are installed, into $SITE. To fill that folder with what the machine lacks, on a machine with a network:
#
#   python3 -m pip download --no-deps --only-binary=:all: --python-version 3.12 -d .whl \
#       diffusers==0.42.1 importlib_metadata==10.2.0 jaxtyping==0.3.11 wadler-lindig==0.1.8 \
#       huggingface_hub==1.33.0 modelscope==1.40.2 modelscope_hub==0.5.1 click==8.5.1 rich==15.0.0
#
# Only these packages are downloaded, without their dependencies: name those that the machine lacks, too.
set -uo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
wheels=${WHEELS:-.whl}
site=${SITE:-/tmp/diffsynth-gpu-site}
out=${OUT:-benchmarks/results}

# Seconds that a part may take: below ten minutes, and thirty together.
declare -A limit=([qwen-image]=190 [z-image]=100 [flux]=200 [tests]=200 [attention]=140 [accuracy]=60 [kernels]=80
    [loading]=80 [plan]=100 [vram-flux]=160 [vram-wan]=210 [vram-z-image]=80 [wan]=200)
# The newest first, for a machine that is lent for less than the time of all.
parts=(qwen-image z-image flux tests attention accuracy kernels loading plan vram-flux vram-wan vram-z-image wan)

# The steps of a part, one a line: name, then the command.
steps() {
    case $1 in
        # Without the options of pyproject.toml: one process, and no need for pytest-xdist.
        tests) echo "tests $python -m pytest tests/gpu -q -p no:cacheprovider -o addopts=--import-mode=importlib" ;;
        qwen-image) echo "$1 $python benchmarks/qwen_image.py --repeats 1 --contenders diffsynth diffusers diffsynth-compiled --json $out/$1-gpu.json" ;;
        z-image) echo "$1 $python benchmarks/z_image.py --repeats 3 --cases z-image-turbo --contenders diffsynth diffusers diffsynth-compiled --json $out/$1-gpu.json" ;;
        flux) echo "flux $python benchmarks/flux.py --repeats 2 --json $out/flux-gpu.json" ;;
        attention) echo "attention $python benchmarks/attention.py --repeats 3 --json $out/attention-gpu.json" ;;
        accuracy) echo "accuracy $python benchmarks/attention_accuracy.py --device cuda --json $out/attention-accuracy-gpu.json" ;;
        kernels) echo "kernels $python benchmarks/nn_kernels.py --repeats 10 --json $out/nn_kernels-gpu.json" ;;
        loading) echo "loading $python benchmarks/loading.py --size-gb 4 --repeats 1 --contenders load_file diffusers diffsynth --json $out/loading-gpu.json" ;;
        plan) echo "plan $python benchmarks/plan.py --json $out/plan-gpu.json" ;;
        # A step takes seconds, and each contender pins 28 GB of memory: fewer steps and contenders.
        vram-wan) echo "$1 $python benchmarks/vram.py --networks wan --warmup 1 --repeats 1 --without fp8 --json $out/$1-gpu.json" ;;
        wan) echo "wan $python benchmarks/wan.py --cases t2v-1.3b decode --repeats 1 --json $out/wan-gpu.json" ;;
        vram-*) echo "$1 $python benchmarks/vram.py --networks ${1#vram-} --warmup 1 --repeats 2 --json $out/$1-gpu.json" ;;
    esac
}

usage() { sed -n '2,/^set /p' "$0" | sed '$d; s/^# \{0,1\}//'; }

dry=0 wanted=()
for argument in "$@"; do
    case $argument in
        -h | --help) usage; exit 0 ;;
        --list) printf '%s\n' "${parts[@]}"; exit 0 ;;
        --dry-run) dry=1 ;;
        all) wanted+=("${parts[@]}") ;;
        *)
            if [[ ${limit[$argument]+there} ]]; then
                wanted+=("$argument")
            else
                echo "gpu.sh: there is no part $argument; expected all, ${parts[*]}" >&2
                exit 2
            fi
            ;;
    esac
done
if ((${#wanted[@]} == 0)); then
    echo "gpu.sh: which part? all, ${parts[*]}" >&2
    exit 2
fi

# Make our packages importable as if installed: PYTHONPATH, and the metadata through which plugins are found.
prepare() {
    mkdir -p "$site" "$out"
    shopt -s nullglob
    local found=("$wheels"/*.whl)
    if ((${#found[@]})); then
        "$python" -m pip install -q --no-index --no-deps --no-compile --upgrade --target "$site" "${found[@]}" || return 1
    fi
    "$python" - "$site" <<'PYTHON' || return 1
import pathlib
import sys
import tomllib

site = pathlib.Path(sys.argv[1])
for file in sorted(pathlib.Path("packages").glob("*/pyproject.toml")):
    project = tomllib.loads(file.read_text())["project"]
    name, version = project["name"], project["version"]
    folder = site / f"{name.replace('-', '_')}-{version}.dist-info"
    folder.mkdir(exist_ok=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    groups = {"console_scripts": project.get("scripts", {}), **project.get("entry-points", {})}
    lines = [f"[{group}]\n" + "".join(f"{key} = {value}\n" for key, value in rows.items()) for group, rows in groups.items()]
    (folder / "entry_points.txt").write_text("\n".join(lines))
PYTHON
    PYTHONPATH=$site$(printf ':%s' "$PWD"/packages/*/src):$PWD${PYTHONPATH:+:$PYTHONPATH}
    export PYTHONPATH PYTHONUNBUFFERED=1
    unset TRITON_INTERPRET
}

rows=() failed=0
((dry)) || prepare || { echo "gpu.sh: the packages could not be set up" >&2; exit 1; }
for part in "${wanted[@]}"; do
    while read -r name command; do
        if ((dry)); then
            echo "timeout ${limit[$part]} $command"
            continue
        fi
        started=$SECONDS
        # Split into words on purpose: no argument has a space in it.
        timeout --kill-after=10 "${limit[$part]}" $command </dev/null 2>&1 | tee "$out/$name.log"
        code=${PIPESTATUS[0]}
        verdict=done
        ((code == 0)) || verdict="failed, exit code $code" failed=1
        ((code != 124 && code != 137)) || verdict="out of time"
        rows+=("$(printf '%-14s %5d s  %s' "$name" $((SECONDS - started)) "$verdict")")
        rows+=("$(tail -n 12 "$out/$name.log" | cut -c 1-150 | sed 's/^/    /')")
    done < <(steps "$part")
done
((dry)) || { echo; echo "=== summary ==="; printf '%s\n' "${rows[@]}"; }
exit $failed

#!/usr/bin/env bash
# check_cuda.sh DIR: compiles every .cu under DIR for sm_80, sm_90, sm_100 and PTX, with neither GPU nor torch, and
# prints each kernel's registers. Fails on a register spill, on local memory, and where there is no .cu at all.
set -euo pipefail
dir=${1:?usage: check_cuda.sh DIR}
nvcc=${NVCC:-nvcc}
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
architectures=(-gencode arch=compute_80,code=sm_80 -gencode arch=compute_90,code=sm_90
               -gencode 'arch=compute_100,code=[sm_100,compute_100]')
n=0
while IFS= read -r -d '' file; do
    "$nvcc" -c -O3 -std=c++17 -lineinfo -I"$dir" "${architectures[@]}" -Xcompiler -Wall,-Wextra,-fPIC \
        -Xptxas -v,-warn-spills,-warn-lmem-usage,-Werror "$file" -o "$out/kernel.o" 2>"$out/log" ||
        { grep -v "ptxas info" "$out/log"; echo "FAIL $file"; exit 1; }
    c++filt <"$out/log" | sed 's/(anonymous namespace):://g' | awk -v file="${file##*/}" '
        /Compiling entry function/ { split($0, quoted, "\047"); name = quoted[2]; sub(/\(.*/, "", name); arch = quoted[4] }
        /Used [0-9]+ registers/ { match($0, /Used [0-9]+ registers/)
            printf "%-16s %-7s %-60s %s\n", file, arch, name, substr($0, RSTART + 5, RLENGTH - 5) }'
    n=$((n + 1))
done < <(find "$dir" -name '*.cu' -print0 | sort -z)
[ "$n" -gt 0 ] || { echo "no .cu found under $dir"; exit 1; }
echo "$n files compiled for sm_80, sm_90, sm_100 and PTX: no spill, no local memory"

# The environment of a card's session: `source benches/gpu/env.sh`, from anywhere.
# Needs no network, no virtual environment and no installation.
here="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
export OMP_NUM_THREADS=1 CUBLAS_WORKSPACE_CONFIG=:4096:8 TOKENIZERS_PARALLELISM=false
# A cache that was filled elsewhere is unpacked to where it can be written.
export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-$(mktemp -d)/triton}"
mkdir -p "$TRITON_CACHE_DIR"
if [ -f "$here/build/carried/triton-cache.tar.xz" ]; then
  tar -xJf "$here/build/carried/triton-cache.tar.xz" -C "$TRITON_CACHE_DIR"
  # Triton notes where the files of a kernel lie, and takes none that it does not find there.
  find "$TRITON_CACHE_DIR" -name '__grp__*.json' -exec \
    sed -E -i "s#\"/[^\"]*/([A-Z0-9]+/[^\"/]+)\"#\"$TRITON_CACHE_DIR/\1\"#g" {} +
fi
unset here

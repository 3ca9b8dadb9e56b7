# Sourced with $venv set: an empty virtual environment there, and `install`, which fills it with uv: in seconds, where
# pip takes minutes. uv does not read pip's settings, so they are handed to it here.
setting() { "$venv/bin/pip" config list | sed -n "s/^.*\.$1='\(.*\)'$/\1/p" | sed 's/\\n/ /g' | tail -1; }
hand_over() { if [ -n "$2" ]; then export "$1=$2"; fi; }

python3 -m venv "$venv"
"$venv/bin/pip" install -q uv
hand_over UV_DEFAULT_INDEX "$(setting index-url)"
hand_over UV_INDEX "$(setting extra-index-url)"
hand_over UV_FIND_LINKS "$(setting find-links | tr ' ' ,)"
hand_over UV_CONSTRAINT "$(setting constraint)"
hand_over SSL_CERT_FILE "$(setting cert)"
export UV_INDEX_STRATEGY=unsafe-best-match # as pip: the best version of all indexes, not the first index's best

install() { "$venv/bin/uv" pip install --quiet --compile-bytecode --python "$venv/bin/python" "$@"; }

# Torch with two threads beside any busy process can run 60 times slower unless waiting threads sleep.
export OMP_WAIT_POLICY = PASSIVE
# Our folder `kernels` must never answer for the distribution of that name.
export PYTHONSAFEPATH = 1

PYTHON ?= python3
BIN := .venv/bin
OUT := out
WORKERS ?= 2
# One thread a worker; who is done first takes from the rest of another's tests, which lie together file by file.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses $(WORKERS) --dist worksteal

.PHONY: demo test test-long lint clean always

demo: .venv/ready
	$(BIN)/diffpress compress zoo:emoji --recipe balanced --out $(OUT)/emoji
	$(BIN)/diffpress verify $(OUT)/emoji
	$(BIN)/diffpress compare zoo:emoji $(OUT)/emoji --count 8
	$(BIN)/diffpress export $(OUT)/emoji --to onnx --out $(OUT)/emoji-onnx
	$(BIN)/diffpress run $(OUT)/emoji --prompt "slice of pizza" --seed 1 --out $(OUT)/pizza.png
	$(BIN)/diffpress run $(OUT)/emoji-onnx --prompt "slice of pizza" --seed 1 --out $(OUT)/pizza-onnx.png
	@echo "Open $(OUT)/emoji/report.html"

test: .venv/ready lint
	$(PYTEST) -m "not long"

test-long: .venv/ready
	$(PYTEST) -m long

lint: .venv/ready build/links
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The editable install knows files by their names: where one comes or goes, it is made anew.
build/files: always
	@mkdir -p build
	@find calibration compress diffpress export kernels -name '*.py' | sort > $@.now
	@cmp -s $@.now $@ || cp $@.now $@

.venv/ready: pyproject.toml constraints.txt CMakeLists.txt build/files $(wildcard kernels/cpu/*.cpp kernels/cpu/*.h kernels/cpu/tiers/* edge/*)
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	# The editable install also puts the repository root on sys.path, where our `kernels` would answer for that distribution.
	sed -i.bak '/^\//d' .venv/lib/python3*/site-packages/_editable_skbc_diffpress.pth
	touch $@

# One tree as it is installed, for mypy: the four folders inside the package.
build/links: $(wildcard diffpress/*)
	rm -rf $@
	mkdir -p $@/diffpress
	ln -s $(CURDIR)/diffpress/* $(addprefix $(CURDIR)/,calibration compress export kernels) $@/diffpress

clean:
	rm -rf .venv build $(OUT)

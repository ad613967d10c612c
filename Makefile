# make demo   simulate, train, sample, judge: pictures in runs/demo after about six minutes on two cores
# make test   the whole test suite; make quick: a minute of it, for another Python
# make lint   ruff and pyright; make docs: this documentation as pages in build/docs, with every link checked
# make faults every fault, the slow ones as well, and the table of docs/reliability.md; FAULT_MOMENTS=100 kills so often
#             of each kind (10), FAULT_SOAK_MINUTES=60 soaks so long (2)
# make bench  every benchmark and the tables of docs/performance.md, in half an hour or more; the rival is
#             `pip install --no-deps guided-diffusion-sdk`, left out if absent; BENCH="--model_path FILE" adds whole jobs
# Without make: sh setup.sh, then the command of the rule with .venv/bin in front of the PATH.

.PHONY: setup demo test quick faults bench lint docs clean

setup:
	@sh setup.sh

demo: setup
	@PATH="$$(cat .env_bin):$$PATH" sh scripts/demo.sh

test: setup
	@PATH="$$(cat .env_bin):$$PATH" OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES= python -m pytest -q -n 2 --dist worksteal

QUICK = architecture checkpoint cli dit fp16_util gaussian_diffusion samplers unet
quick: setup
	@PATH="$$(cat .env_bin):$$PATH" OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES= python -m pytest -q -n 2 --dist worksteal \
		-m "not slow" $(QUICK:%=tests/test_%.py)

faults: setup
	@PATH="$$(cat .env_bin):$$PATH" OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES= python -m pytest -q -n 2 --dist worksteal \
		tests/faults --all_faults --reliability docs/reliability.md

bench: setup
	@PATH="$$(cat .env_bin):$$PATH" python benchmarks/run.py $(BENCH)
	@PATH="$$(cat .env_bin):$$PATH" python benchmarks/tables.py

lint: setup
	@PATH="$$(cat .env_bin):$$PATH" ruff check
	@PATH="$$(cat .env_bin):$$PATH" ruff format --check
	@PATH="$$(cat .env_bin):$$PATH" pyright

docs: setup
	@PATH="$$(cat .env_bin):$$PATH" python -m pip install -q -c constraints.txt mkdocs-material mkdocstrings-python
	@PATH="$$(cat .env_bin):$$PATH" NO_MKDOCS_2_WARNING=1 mkdocs build --strict

clean:
	rm -rf .venv .env_bin .env_stamp .env_constraints runs/demo

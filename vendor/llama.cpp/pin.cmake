# The one place that says which llama.cpp reap is built from. CHANGELOG.md has a line for each change.
set(REAP_LLAMA_CPP_PACKAGE llama-cpp-python)
set(REAP_LLAMA_CPP_VERSION 0.3.36)
set(REAP_LLAMA_CPP_SHA256 832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e)
set(REAP_LLAMA_CPP_COMMIT 0c1e57098bba43ac29e6e3b677cdceebdd22334f)

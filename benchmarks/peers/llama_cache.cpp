// KL of llama.cpp's quantized KV cache against its own f16 cache, token by token.
//
//   llama_cache MODEL.gguf IDS LENGTH TYPE_K TYPE_V OUT [THREADS]
//
// IDS: int32 token ids, of which windows of LENGTH are read one after another. OUT: float32 [windows, LENGTH - 1, 4]: the loss with the
// f16 cache, the loss with this one, KL(f16 || this one) in nats, and whether both name the same next token.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "ggml.h"
#include "llama.h"

static ggml_type type_named(const char * name) {
    for (int i = 0; i < GGML_TYPE_COUNT; ++i) {
        const char * known = ggml_type_name((ggml_type) i);
        if (known && !strcmp(known, name)) {
            return (ggml_type) i;
        }
    }
    fprintf(stderr, "%s is no type of ggml\n", name);
    exit(2);
}

static llama_context * context(llama_model * model, int length, ggml_type k, ggml_type v, int threads) {
    llama_context_params how = llama_context_default_params();
    how.n_ctx = length;
    how.n_batch = how.n_ubatch = std::min(length, 512);
    how.n_threads = how.n_threads_batch = threads;
    how.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED;
    how.type_k = k;
    how.type_v = v;
    llama_context * made = llama_init_from_model(model, how);
    if (!made) {
        fprintf(stderr, "llama.cpp makes no context with this cache\n");
        exit(3);
    }
    return made;
}

struct Row {
    int top;
    double most, log_sum;
};

static Row row_of(const float * logits, int vocabulary) {
    Row row{(int) (std::max_element(logits, logits + vocabulary) - logits), 0, 0};
    row.most = logits[row.top];
    double sum = 0;
    for (int i = 0; i < vocabulary; ++i) {
        sum += std::exp(logits[i] - row.most);
    }
    row.log_sum = std::log(sum);
    return row;
}

int main(int argc, char ** argv) {
    if (argc < 7) {
        fprintf(stderr, "llama_cache MODEL.gguf IDS LENGTH TYPE_K TYPE_V OUT [THREADS]\n");
        return 2;
    }
    const int length = atoi(argv[3]), threads = argc > 7 ? atoi(argv[7]) : 1;
    std::vector<int32_t> ids;
    FILE * file = fopen(argv[2], "rb");
    for (int32_t id; file && fread(&id, 4, 1, file) == 1;) {
        ids.push_back(id);
    }
    llama_log_set([](ggml_log_level level, const char * text, void *) {
        if (level >= GGML_LOG_LEVEL_WARN) {
            fputs(text, stderr);
        }
    }, nullptr);
    llama_backend_init();
    llama_model_params params = llama_model_default_params();
    llama_model * model = llama_model_load_from_file(argv[1], params);
    if (!model) {
        return 1;
    }
    const int vocabulary = llama_vocab_n_tokens(llama_model_get_vocab(model));
    llama_context * both[2] = {context(model, length, GGML_TYPE_F16, GGML_TYPE_F16, threads),
                               context(model, length, type_named(argv[4]), type_named(argv[5]), threads)};
    FILE * out = fopen(argv[6], "wb");
    llama_batch batch = llama_batch_init(512, 0, 1);
    for (size_t window = 0; (window + 1) * length <= ids.size(); ++window) {
        for (llama_context * one : both) {
            llama_memory_clear(llama_get_memory(one), true);
        }
        for (int start = 0; start < length; start += 512) {
            batch.n_tokens = std::min(512, length - start);
            for (int i = 0; i < batch.n_tokens; ++i) {
                batch.token[i] = ids[window * length + start + i];
                batch.pos[i] = start + i;
                batch.n_seq_id[i] = 1;
                batch.seq_id[i][0] = 0;
                batch.logits[i] = 1;
            }
            for (llama_context * one : both) {
                if (llama_decode(one, batch)) {
                    fprintf(stderr, "llama.cpp does not decode with this cache\n");
                    return 4;
                }
            }
            for (int i = 0; i < batch.n_tokens && start + i + 1 < length; ++i) {
                const float * p = llama_get_logits_ith(both[0], i), * q = llama_get_logits_ith(both[1], i);
                const Row a = row_of(p, vocabulary), b = row_of(q, vocabulary);
                const int next = ids[window * length + start + i + 1];
                double kl = 0;
                for (int t = 0; t < vocabulary; ++t) {
                    const double log_p = p[t] - a.most - a.log_sum;
                    kl += std::exp(log_p) * (log_p - (q[t] - b.most - b.log_sum));
                }
                const float found[4] = {(float) (a.most + a.log_sum - p[next]), (float) (b.most + b.log_sum - q[next]),
                                        (float) kl, a.top == b.top ? 1.0f : 0.0f};
                fwrite(found, 4, 4, out);
            }
        }
        fflush(out);
        fprintf(stderr, "window %zu\n", window + 1);
    }
    fclose(out);
    return 0;
}

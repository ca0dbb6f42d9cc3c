/* plugins/gpt/plugin.c - the descriptor and options of the GPT-2 model.  Constant data; any thread.
 *
 * The architecture is GPT-2's exactly (Radford et al. 2019): learned positions, biases everywhere, pre-norm blocks,
 * layer norm 1e-5 (norm_eps), GELU with tanh, the head tied to the token embedding.  Weights of linear layers are
 * stored (out, in), as in torch's Linear and llm.c, not (in, out) as in Hugging Face's Conv1D; names are Hugging Face's
 * without "transformer.". */
#include "gpt.h"

static const char *const size_choices[] = {"none", "tiny", "124M", "355M", "774M", "1558M", NULL};

static const phx_option options[] = {
    PHX_ENUM(gpt_config, size, "none", size_choices,
             "Preset of layers, heads, width, context and vocab; tiny suits byte-level text on two CPU cores."),
    PHX_INT(gpt_config, layers, "0", 0, 1024, NULL, 0, "Transformer blocks; 0 takes the preset's."),
    PHX_INT(gpt_config, heads, "0", 0, 1024, NULL, 0, "Attention heads, a divisor of width; 0 takes the preset's."),
    PHX_INT(gpt_config, width, "0", 0, 65536, NULL, 0, "Channels of the residual stream; 0 takes the preset's."),
    PHX_INT(gpt_config, context, "0", 0, 1048576, "tokens", 0, "Longest sequence; 0 takes the preset's."),
    PHX_INT(gpt_config, vocab, "0", 0, 1048576, "tokens", 0, "Vocabulary; 0 takes the preset's."),
    PHX_INT(gpt_config, vocab_pad, "64", 1, 4096, "elements", 0,
            "The logits' row length is rounded up to a multiple of this, for speed; the loss does not change."),
    PHX_REAL(gpt_config, layer_drop, "0", 0, 1,
             "Probability that a block is skipped for a micro-batch on a data rank (LayerDrop, arXiv 1909.11556)."),
    PHX_STRING(gpt_config, freeze, "", 0,
               "Comma separated patterns of parameter names that are not trained, such as wte.*,h.0.*."),
    PHX_REAL(gpt_config, norm_eps, "1e-5", 1e-12, 1,
             "Added to the variance in every layer norm (Hugging Face's layer_norm_epsilon)."),
};

static const char *const extensions[] = {PHX_EXT_OPS, PHX_EXT_DEVICE, NULL};

static const phx_model_table table = {
    .struct_size = sizeof(phx_model_table),
    .declare = gpt_declare,
    .stage_memory = gpt_stage_memory,
    .create = gpt_create,
    .destroy = gpt_destroy,
    .stage_runs = gpt_stage_runs,
    .forward = gpt_forward,
    .backward = gpt_backward,
};

static const phx_plugin descriptor = {
    .struct_size = sizeof(phx_plugin),
    .kind = PHX_KIND_MODEL,
    .table_major = PHX_ABI_MAJOR,
    .table_minor = PHX_ABI_MINOR,
    .id = "gpt",
    .version = "0.1.0",
    .summary = "GPT-2: decoder-only transformer with learned positions and a tied head.",
    .vendor = "Phalanx",
    .license = "unspecified",
    .build = __VERSION__,
    .provides = PHX_CAP_DETERMINISTIC | PHX_CAP_BF16,
    .extensions = extensions,
    .options = options,
    .n_options = sizeof options / sizeof options[0],
    .option_stride = sizeof options[0],
    .config_size = sizeof(gpt_config),
    .table = &table,
};

const phx_plugin *phx_plugin_v1(void) { return &descriptor; }

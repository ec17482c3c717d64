"""Every fact, defect and trap of the method, and what holds it here: checks, tests, or a reason why nothing has to.

The labels are those that checks carry (`Check.rows`): D1 to D23 are defects found in other implementations, 3.1 to 3.10
what a faithful one must match, "trap 4.1" to "trap 4.18" numeric traps. Tests are named as FILE::NAME below ``tests/``.
"""

from typing import NamedTuple

from maekit.conformance.suite import CHECKS


class Row(NamedTuple):
    """One fact.

    Attributes:
        label: as in `Check.rows`.
        fact: what is so, or what was found.
        tests: FILE::NAME, beside the checks that carry the label.
        reason: why neither check nor test has to hold it.
    """

    label: str
    fact: str
    tests: tuple[str, ...] = ()
    reason: str = ""


class Defect(NamedTuple):
    """A defect that a peer was found to have, and the checks that show whether a version still has it."""

    label: str
    peer: str
    checks: tuple[str, ...]


def checks_of(label: str) -> list[str]:
    """Return the names of the checks that carry a label."""
    return [check.name for check in CHECKS if label in check.rows]


NOT_BUILT = "this package does not have it yet; the README lists it as missing"
THEIRS = "it is about the authors' files and scripts, of which no line is here"

DEFECTS = (
    Row("D1", "transformers 5: position tables, class and mask token are zeroed after they were set",
        ("model/test_initial_weights.py::test_defect_1_every_position_table_is_filled_and_encodes_place",)),
    Row("D2", "transformers 4.57: decoder positions and mask token are zero",
        ("model/test_initial_weights.py::"
         "test_defects_1_and_2_predictions_differ_between_masked_places_from_the_start",)),
    Row("D3", "transformers: plain pixels, N(0, .02) weights, epsilon 1e-12, betas of Trainer, masked features"),
    Row("D4", "lightly: layer decay looks for torchvision's names in a timm model, so nothing is scaled"),
    Row("D5", "lightly: stochastic depth is added to torchvision's blocks only, so to none"),
    Row("D6", "lightly: class token and positions are in no group of the fine-tuning optimizer"),
    Row("D7", "lightly: plain pixels are predicted where the paper's number needs normalised ones"),
    Row("D8", "solo-learn: blocks are rebuilt without drop_path",
        ("model/test_heads.py::test_drop_path_rises_linearly_over_the_blocks",)),
    Row("D9", "solo-learn: decoder norms of epsilon 1e-5",
        ("model/test_initial_weights.py::test_the_decoder_has_eps_1e_6_for_every_encoder",)),
    Row("D10", "mmpretrain: mask=False still masks",
        ("model/test_mae.py::test_defect_10_features_are_timms_own_and_never_masked",)),
    Row("D11", "stable-pretraining: no class token in the decoder, timm's weights, learned positions, channel slowest"),
    Row("D12", "stable-pretraining: the host waits for the device in every step",
        ("model/test_mae.py::test_it_compiles_without_a_graph_break_and_stays_equal",)),
    Row("D13", "official code: does not start on current torch, numpy and timm", (), THEIRS),
    Row("D14", "official code: micro-batches that fill no window are dropped; small sets never update",
        ("tasks/test_pretrain.py::test_a_short_last_batch_is_trained_and_dropped_where_asked",
         "data/test_loader.py::test_a_set_smaller_than_a_batch_is_one_short_batch_an_epoch")),
    Row("D15", "official code: requeueing reads a file that nobody writes",
        ("tasks/test_pretrain.py::test_a_signal_to_the_group_saves_and_the_same_command_goes_on",)),
    Row("D16", "official code: a wait for the device in each iteration"),
    Row("D17", "official code decays class and mask token, mmpretrain does not: matched to the official one",
        ("train/test_optim.py::test_tokens_decay_in_pretraining_and_vectors_biases_and_fixed_tables_do_not",)),
    Row("D18", "official code: a mean-pooled linear probe has a random, frozen fc_norm",
        ("model/test_heads.py::test_mean_pooling_is_of_patch_tokens_without_the_prefix",)),
    Row("D19", "official code: evaluation counts padding twice",
        ("data/test_loader.py::test_a_sweep_covers_each_sample_once",)),
    Row("D20", "pengzhiliang/MAE-pytorch: pictures use the true statistics of removed patches",
        ("report/test_reconstruction.py::test_a_leaking_view_is_labelled_as_leaking_and_stays_out_of_the_combined_picture",
         "report/test_reconstruction.py::test_the_scored_views_do_not_change_when_removed_pixels_change")),
    Row("D21", "transformers: decoder positions are interpolated along one axis"),
    Row("D22", "lightly-train, timm, big_vision and dinov2 have no masked autoencoder", (), "a gap, not a defect"),
    Row("D23", "transformers 5: saved decoders have names that 4.57 does not read"),
)  # fmt: skip
"""Found in other implementations."""

FACTS = (
    Row("3.1 blocks", "pre-norm blocks, qkv bias, GELU, MLP of 4 D, epsilon 1e-6 everywhere",
        ("parity/test_transformers.py::test_the_autoencoder_is_transformers_in_mask_latent_prediction_loss_and_gradients",)),
    Row("3.1 class and mask token", "both start N(0, .02)"),
    Row("3.1 positions", "both tables fixed 2-D sine-cosine, zeros for the class token"),
    Row("3.1 patch projection", "Xavier over the flattened kernel; the bias keeps torch's default"),
    Row("3.1 linear layers", "Xavier uniform, the fused qkv as one matrix; biases 0, norms 1 and 0"),
    Row("3.1 patchify", "rows, columns, channel fastest",
        ("model/test_patches.py::test_patchify_and_unpatchify_are_inverse_and_agree_with_the_loops",)),
    Row("3.1 decoder", "512 wide, 8 blocks, 16 heads for B, L and H; H with patches of 14 px",
        ("model/test_sizes.py::test_parameters_are_those_of_the_published_models",)),
    Row("3.1 sin-cos", "the first half of the channels encodes x; base 10000, [sin | cos]",
        ("model/test_patches.py::test_trap_6_the_width_comes_first",)),
    Row("3.1 interpolation", "bicubic over both axes, prefix kept",
        ("model/test_patches.py::test_positions_are_resampled_as_by_timm_and_the_prefix_stays",)),
    Row("3.1 parameters", "111.91, 329.54 and 657.07 M with the fixed tables"),
    Row("3.1 cost", "9.78, 20.76 and 48.56 GMAC a masked forward pass",
        ("model/test_sizes.py::test_forward_costs_are_those_of_the_method_less_the_projection_of_removed_patches",)),
    Row("3.2 len_keep", "int(N (1 - r)) patches stay"),
    Row("3.2 noise", "noise for each image and patch; the lowest stay"),
    Row("3.2 mask", "0 kept, 1 removed, in image order",
        ("model/test_masking.py::test_trap_2_true_means_removed_and_the_lowest_noise_stays",)),
    Row("3.2 encoder", "positions before masking, class token afterwards, final norm",
        ("model/test_against_the_paper.py::test_outputs_and_all_gradients_are_those_of_the_reference",)),
    Row("3.2 decoder", "project, mask tokens, unshuffle, class token, positions, blocks, norm, predict"),
    Row("3.3 target", "(t - mean) / sqrt(var + 1e-6) with the unbiased variance"),
    Row("3.3 loss", "mean over a patch's values, then over the removed patches of the batch"),
    Row("3.4 optimiser", "AdamW, betas .9 and .95, decay .05 but for 1-D parameters and biases"),
    Row("3.4 lr", "1.5e-4 x batch / 256, linear warm-up and half-cosine by the step",
        ("train/test_schedule.py::test_official_pretraining_rate_at_named_epochs",)),
    Row("3.4 batch", "4096; accumulation divides the loss",
        ("train/test_loop.py::test_accumulation_gives_the_gradient_of_the_whole_batch",)),
    Row("3.4 augmentation", "random resized crop (.2, 1), bicubic, mirrored half",
        ("data/test_augment.py::test_the_random_crop_is_that_of_torchvision",
         "data/test_augment.py::test_half_of_the_images_are_mirrored_and_none_when_switched_off")),
    Row("3.4 other", "no clipping, no drop path, no average; incomplete batches dropped",
        ("test_recipes.py::test_the_papers_recipes_are_its_tables",)),
    Row("3.5 recipes", "the values of B, L and H, of the code and of table 9",
        ("test_recipes.py::test_the_papers_recipes_are_its_tables",
         "test_recipes.py::test_golden_no_value_of_any_recipe_moves_unnoticed",
         "test_recipes.py::test_where_paper_and_code_disagree_each_names_the_other")),
    Row("3.5 LLRD", "decay^(layers above); no decay for 1-D parameters, positions and class token",
        ("train/test_optim.py::test_layer_decay_reaches_the_numbers_of_the_paper",)),
    Row("3.5 model", "fc_norm for norm, positions trained, head 2e-5, linear drop path",
        ("model/test_heads.py::test_pretrained_weights_are_taken_over_and_only_head_and_norm_are_new",)),
    Row("3.5 crop", "evaluation: Resize(256, bicubic), CenterCrop(224)",
        ("data/test_augment.py::test_evaluation_is_torchvisions_resize_to_256_and_centre_crop",)),
    Row("3.5 loss", "soft targets under mixup and cutmix",
        ("tasks/test_finetune.py::test_a_batch_of_any_size_is_mixed_with_its_own_reverse",)),
    Row("3.6 optimiser", "LARS on matrices only, trust .001, no decay, momentum .9",
        ("train/test_optim.py::test_lars_adapts_the_weight_by_its_norms_and_leaves_the_bias_to_plain_momentum",)),
    Row("3.6 head", "batch norm without affine part, epsilon 1e-6, linear layer of deviation .01",
        ("tasks/test_probe_knn.py::test_in_train_mode_only_the_batch_norm_of_the_probe_reacts",)),
    Row("3.6 crop", "a clamped crop without rejections",
        ("data/test_augment.py::test_a_clamped_crop_draws_area_evenly_and_aspect_evenly_in_its_logarithm",)),
    Row("3.7 scratch", "table 11: training from scratch",
        ("test_recipes.py::test_the_papers_recipes_are_its_tables",)),
    Row("3.7 partial fine-tuning", "the best of 50, 100 and 200 epochs", (), NOT_BUILT),
    Row("3.7 detection and segmentation", "COCO, ADE20K and ViTDet recipes", (), NOT_BUILT),
    Row("3.8 successors", "long_seq_mae, Pixio, CrossMAE, ColorMAE, Hiera, DailyMAE, MIM-Refiner, FCMAE, SparK", (),
        "other methods than the paper's; " + NOT_BUILT),
    Row("3.9 keys", "names of the official files",
        ("parity/test_timm.py::test_timm_gives_tokens_class_token_and_mean_of_an_encoder_file",)),
    Row("3.9 released files", "digests of the released files", (),
        "they are under a non-commercial licence and are neither shipped nor fetched"),
    Row("3.10 len_keep", "int() truncates"),
    Row("3.10 variance", "unbiased"),
    Row("3.10 patch order", "channel fastest"),
    Row("3.10 sin-cos", "x first", ("model/test_patches.py::test_trap_6_the_width_comes_first",)),
    Row("3.10 class token in decoder", "it takes part"),
    Row("3.10 conv bias", "torch's default"),
    Row("3.10 tokens decay", "class and mask token decay"),
    Row("3.10 lr", "by the step, from 0"),
    Row("3.10 probe", "no decay on its head"),
    Row("3.10 eval resize", "256, bicubic"),
    Row("3.10 positions train", "in fine-tuning"),
    Row("3.10 head std", "2e-5 to fine-tune, .01 to probe"),
    Row("3.10 fc_norm", "in place of norm"),
    Row("3.10 blr", "batch / 256"),
    Row("3.10 mixup", "by the batch",
        ("tasks/test_finetune.py::test_a_batch_of_any_size_is_mixed_with_its_own_reverse",)),
    Row("3.10 leftovers", "micro-batches that fill no window"),
)  # fmt: skip
"""What a faithful implementation must match."""

TRAPS = (
    Row("trap 4.1", "int(N (1 - r)) loses patches to float dust",
        ("model/test_masking.py::test_trap_1_the_number_kept_is_free_of_float_dust",
         "parity/test_transformers.py::test_at_a_ratio_with_float_dust_they_keep_a_patch_less")),
    Row("trap 4.2", "polarity of the mask",
        ("model/test_masking.py::test_trap_2_true_means_removed_and_the_lowest_noise_stays",)),
    Row("trap 4.3", "the class token must not enter the ratio",
        ("model/test_masking.py::test_trap_3_the_class_token_never_counts",)),
    Row("trap 4.4", "order inside a flattened patch",
        ("model/test_patches.py::test_trap_4_inside_a_patch_the_channel_is_fastest_then_the_column_then_the_row",)),
    Row("trap 4.5", "unbiased variance, epsilon inside the root",
        ("model/test_mae.py::test_trap_5_normalised_pixels_use_the_unbiased_variance_and_eps_inside_the_root",)),
    Row("trap 4.6", "two sine-cosine tables are in circulation",
        ("model/test_patches.py::test_trap_6_the_other_table_in_circulation_differs_by_a_quarter",)),
    Row("trap 4.7", "fixed tables are parameters of the state, and must not decay",
        ("model/test_patches.py::test_trap_7_both_tables_are_frozen_parameters_of_the_state",)),
    Row("trap 4.8", "what the decoder sees, and when the class token is dropped",
        ("model/test_mae.py::test_trap_8_the_class_token_goes_through_the_decoder",)),
    Row("trap 4.9", "the patch projection starts like a linear layer",
        ("model/test_initial_weights.py::test_trap_9_the_patch_projection_starts_like_a_linear_layer",)),
    Row("trap 4.10", "a mean of means is not the mean over the batch",
        ("model/test_mae.py::test_trap_10_the_loss_is_masked_error_over_number_of_masked_patches",)),
    Row("trap 4.11", "the probe's head, without decay, on a frozen encoder",
        ("model/test_heads.py::test_trap_11_the_linear_head_is_a_batch_norm_without_affine_part_and_a_linear_layer",)),
    Row("trap 4.12", "layer decay, fc_norm, head",
        ("model/test_heads.py::test_trap_12_mean_pooling_puts_a_new_norm_in_the_place_of_the_final_one",)),
    Row("trap 4.13", "lr follows the global batch: processes and accumulation too",
        ("train/test_schedule.py::test_rate_scales_with_the_global_batch",)),
    Row("trap 4.14", "samplers of several processes evaluate samples twice",
        ("data/test_loader.py::test_a_sweep_covers_each_sample_once",)),
    Row("trap 4.15", "best epoch on the reported split", (),
        "no epoch is chosen: a score is the last epoch's, and the output says so"),
    Row("trap 4.16", "an incomplete accumulation window is dropped",
        ("tasks/test_pretrain.py::test_a_short_last_batch_is_trained_and_dropped_where_asked",)),
    Row("trap 4.17", "unsorted listings, seeds of workers, randomness after a resume",
        ("data/test_sources.py::test_the_order_is_that_of_the_names_whatever_the_disk_says",
         "data/test_loader.py::test_the_number_of_workers_changes_nothing",
         "train/test_loop.py::test_stop_at_any_step_and_go_on_gives_the_same_bits_and_losses")),
    Row("trap 4.18", "torch.load of a pickle runs code",
        ("interchange/test_weights.py::test_a_pickle_is_refused_and_its_payload_never_runs",)),
)  # fmt: skip
"""Numeric traps."""

ROWS: tuple[Row, ...] = (*DEFECTS, *FACTS, *TRAPS)

KNOWN = (
    Defect("D1", "transformers", ("positions-encoder", "positions-decoder", "init-class-token", "init-mask-token",
                                  "predictions-differ")),
    Defect("D2", "transformers", ("positions-decoder", "init-mask-token", "predictions-differ")),
    Defect("D3", "transformers", ("target-normalised", "init-linear", "norm-eps", "betas", "features-unmasked")),
    Defect("D4", "lightly", ("layer-decay",)),
    Defect("D5", "lightly", ("drop-path",)),
    Defect("D6", "lightly", ("finetune-groups",)),
    Defect("D7", "lightly", ("target-normalised",)),
    Defect("D11", "stable-pretraining", ("class-token-in-decoder", "init-linear", "positions-encoder", "patch-order",
                                         "learning-rate")),
    Defect("D12", "stable-pretraining", ("host-waits",)),
    Defect("D21", "transformers", ("positions-resized",)),
    Defect("D23", "transformers", ("saved-names",)),
)  # fmt: skip
"""Defects of peers that install from a package index: looked for in every version that was audited."""

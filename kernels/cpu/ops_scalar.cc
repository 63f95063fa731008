// The operations' vector routines for scalar.
#include "simd_f32_scalar.h"
#include "simd_words_scalar.h"

#include "ops_table.h"

#include "ops_body.inc"

#include "attention_body.inc"

namespace hybrid {

const OpsTable kOpsScalar = {
    rms_norm, rotate, encode, decode, encode_q8, decode_q8, swiglu, weighted_sum, accumulate, softmax, sigmoid,
    fix_key, fix_key_q8, copy_key,
    {fix_query, pair_values, score, soften, gather},
    {fix_query, pair_values, score, soften, gather},
    merge, finish, read};

}  // namespace hybrid

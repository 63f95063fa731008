// The operations' vector routines for avx2.
#include "simd_f32_avx2.h"
#include "simd_words_avx2.h"

#include "ops_table.h"

#include "ops_body.inc"

#include "attention_body.inc"

namespace hybrid {

const OpsTable kOpsAvx2 = {
    rms_norm, rotate, encode, decode, encode_q8, decode_q8, swiglu, weighted_sum, accumulate, softmax, sigmoid,
    fix_key, fix_key_q8, copy_key,
    {fix_query, pair_values, score, soften, gather},
    {fix_query, pair_values, score, soften, gather},
    merge, finish, read};

}  // namespace hybrid

/* exp at one level, for activations and attention alike. Included by files that have set LEVEL(name). */

/* Lanes of a where the mask is set, of b elsewhere. */
INLINE vf LEVEL(choose)(vi mask, vf a, vf b) { return (vf)(((vi)a & mask) | ((vi)b & ~mask)); }

/* exp by 2 ** whole * 2 ** rest, the rest by a polynomial; relative error below 2e-7. */
INLINE vf LEVEL(exponential)(vf x) {
    const vf low = (vf){} - 87.0f, high = (vf){} + 88.0f;
    const vf bounded = LEVEL(choose)(x < low, low, LEVEL(choose)(x > high, high, x));
    const vf shifted = bounded * 1.44269504f + 0x1.8p23f;
    const vf whole = shifted - 0x1.8p23f;
    const vf rest = (bounded - whole * 0.693359375f) - whole * -2.12194440e-4f;
    vf p = rest * (1.0f / 5040) + 1.0f / 720;
    p = p * rest + 1.0f / 120;
    p = p * rest + 1.0f / 24;
    p = p * rest + 1.0f / 6;
    p = p * rest + 0.5f;
    p = p * rest + 1.0f;
    p = p * rest + 1.0f;
    const vi power = ((vi)shifted - 0x4b400000 + 127) << 23;
    return LEVEL(choose)(x != x, x, p * (vf)power); /* not a number stays one */
}

/** Comparisons in float64. Matrices are row-major. */

/** ‖actual − expected‖ / ‖expected‖. */
export function relativeError(actual: ArrayLike<number>, expected: ArrayLike<number>): number {
  if (actual.length !== expected.length) throw new Error(`${actual.length} values, expected ${expected.length}`);
  let difference = 0;
  let norm = 0;
  for (let i = 0; i < expected.length; i++) {
    difference += (actual[i]! - expected[i]!) ** 2;
    norm += expected[i]! ** 2;
  }
  return Math.sqrt(difference / norm);
}

/** b [out, rank] times a [rank, in]. */
export function matrixProduct(b: ArrayLike<number>, a: ArrayLike<number>, rank: number): Float64Array {
  const columns = a.length / rank;
  const rows = b.length / rank;
  const product = new Float64Array(rows * columns);
  for (let o = 0; o < rows; o++)
    for (let k = 0; k < rank; k++)
      for (let i = 0; i < columns; i++) product[o * columns + i]! += b[o * rank + k]! * a[k * columns + i]!;
  return product;
}

/** Orthonormal rows with the same span (modified Gram-Schmidt, twice for accuracy). */
function orthonormalRows(matrix: ArrayLike<number>, rank: number): Float64Array[] {
  const width = matrix.length / rank;
  const rows: Float64Array[] = [];
  for (let k = 0; k < rank; k++) {
    const row = Float64Array.from({ length: width }, (_, i) => matrix[k * width + i]!);
    for (let pass = 0; pass < 2; pass++) {
      for (const earlier of rows) {
        let dot = 0;
        for (let i = 0; i < width; i++) dot += row[i]! * earlier[i]!;
        for (let i = 0; i < width; i++) row[i]! -= dot * earlier[i]!;
      }
      const norm = Math.sqrt(row.reduce((sum, x) => sum + x * x, 0));
      for (let i = 0; i < width; i++) row[i]! /= norm;
    }
    rows.push(row);
  }
  return rows;
}

/** An upper bound of the largest principal angle, in rad, between the row spaces of two [rank, in] matrices: the Frobenius norm of what of
 * one lies outside the other. */
export function rowSpaceAngle(left: ArrayLike<number>, right: ArrayLike<number>, rank: number): number {
  const p = orthonormalRows(left, rank);
  const q = orthonormalRows(right, rank);
  let outside = 0;
  for (const row of q) {
    const rest = row.slice();
    for (const other of p) {
      let dot = 0;
      for (let i = 0; i < row.length; i++) dot += row[i]! * other[i]!;
      for (let i = 0; i < row.length; i++) rest[i]! -= dot * other[i]!;
    }
    for (const x of rest) outside += x * x;
  }
  return Math.asin(Math.min(1, Math.sqrt(outside)));
}

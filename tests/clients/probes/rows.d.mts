// The types of rows.mjs.
export const scene: { url: string; key: string; model: string };
export function same(actual: unknown, expected: unknown): void;
export function report(
  name: string,
  isRefusal: (error: unknown) => boolean,
  features: Record<string, () => Promise<void>>,
): Promise<void>;

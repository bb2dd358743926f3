/** Stores a text in this browser. Returns whether it was taken: there may be no room, or no storage at all. */
export function remember(name, text) {
  try {
    localStorage.setItem(name, text);
    return true;
  } catch {
    return false;
  }
}

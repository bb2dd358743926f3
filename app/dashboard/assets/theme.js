// Applies the theme chosen in this browser before the first paint.
const chosen = localStorage.getItem("nibble-theme");
if (chosen) document.documentElement.dataset.theme = chosen;

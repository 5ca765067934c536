document.documentElement.classList.add('js');
const size = document.querySelector('nav input');
if (size) size.oninput = () => document.documentElement.style.setProperty('--tile', size.value + 'px');
